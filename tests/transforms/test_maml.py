"""Adaptation by gradients against the same by hand, without a scan."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.types import Aux, Spec, Task
from research.estimates import accumulated, exact
from research.tasks.families import episodes, families
from research.transforms import anil, cavia, drawn, imaml, maml, meta_sgd, over_tasks, reptile
from research.transforms._example import small_classifier

KEY = jax.random.key(0)
TASK = small_classifier(batch=4)
VARIABLES = TASK.init(KEY)
PARAMS = VARIABLES["params"]


def rows(key, n=4, features=3):
    k_x, k_y = jax.random.split(key)
    targets = jax.random.randint(k_y, (n,), 0, 3)
    return {"inputs": jax.random.normal(k_x, (n, features)), "targets": targets, "mask": jnp.ones(n)}


BATCH = {"support": rows(jax.random.key(1)), "query": rows(jax.random.key(2))}


def plain(params, batch):
    return TASK.loss({**VARIABLES, "params": params}, batch, KEY)[0]


def moved(params, rate, steps=1, stop=lambda i: False, batch=BATCH["support"]):
    """Steps of gradient descent; those that `stop` are constants to whoever differentiates."""
    for i in range(steps):
        grads = jax.grad(plain)(params, batch)
        grads = jax.lax.stop_gradient(grads) if stop(i) else grads
        params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
    return params


def gradient_of(task, variables=VARIABLES, batch=BATCH):
    return jax.jit(jax.grad(lambda p: task.loss({**variables, "params": p}, batch, KEY)[0]))(variables["params"])


def close(a, b, **options):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **({"rtol": 2e-4, "atol": 1e-6} | options)), a, b)


def by_hand(steps, stop=lambda i: False):
    return jax.jit(jax.grad(lambda p: plain(moved(p, 0.3, steps, stop), BATCH["query"])))(PARAMS)


def test_the_loss_and_second_order_gradient_are_those_of_steps_by_hand():
    task = maml(TASK, optax.sgd(0.3), 3)
    value, aux = task.loss(VARIABLES, BATCH, KEY)
    np.testing.assert_allclose(value, plain(moved(PARAMS, 0.3, 3), BATCH["query"]), rtol=1e-5)
    close(gradient_of(task), by_hand(3))
    assert aux.weight == 4 and set(aux.metrics) == {"nll", "support_loss"}
    np.testing.assert_allclose(aux.metrics["support_loss"][0] / 4, plain(moved(PARAMS, 0.3, 2), BATCH["support"]), rtol=1e-5)


def test_orders_and_truncation_stop_what_they_say():
    first = jax.grad(plain)(moved(PARAMS, 0.3, 3), BATCH["query"])  # Finn et al. 2017, section 5.2: the gradient at the end
    close(gradient_of(maml(TASK, optax.sgd(0.3), 3, order="first")), first)
    close(gradient_of(maml(TASK, optax.sgd(0.3), 3, truncation=1)), by_hand(3, lambda i: i < 2))
    far = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), first, by_hand(3)))
    assert max(map(float, far)) > 1e-3  # the orders do differ here


def equations(jaxpr):
    inner = [v for e in jaxpr.eqns for p in e.params.values() for v in (p if isinstance(p, (tuple, list)) else (p,))]
    bodies = [getattr(v, "jaxpr", v) for v in inner]
    return len(jaxpr.eqns) + sum(equations(b) for b in bodies if hasattr(b, "eqns"))


@pytest.mark.parametrize("order", ["second", "first"])
def test_a_hundred_steps_compile_as_one_does(order):
    def count(steps):
        task = maml(TASK, optax.adam(0.1), steps, order=order)
        loss = jax.value_and_grad(lambda p: task.loss({**VARIABLES, "params": p}, BATCH, KEY)[0])
        return equations(jax.make_jaxpr(loss)(PARAMS).jaxpr)

    assert count(2) == count(100)
    assert count(1) in (count(100), count(100) - 1)  # the last of one loss is no slice


def test_methods_answer_after_adaptation():
    task = maml(TASK, optax.sgd(0.3), 2)
    inputs = {"support": BATCH["support"], "query": {"inputs": BATCH["query"]["inputs"]}}
    end = moved(PARAMS, 0.3, 2)
    wanted = TASK.methods["predict"].apply({**VARIABLES, "params": end}, BATCH["query"], KEY)
    np.testing.assert_allclose(task.methods["predict"].apply(VARIABLES, inputs, KEY), wanted, rtol=1e-4, atol=1e-6)
    found = task.methods["adapt"].apply(VARIABLES, {"support": BATCH["support"]}, KEY)
    close(found["params"], end)
    wanted = [plain(moved(PARAMS, 0.3, i), BATCH["support"]) for i in range(2)]
    np.testing.assert_allclose(found["losses"], wanted, rtol=1e-5)


def test_the_state_sees_the_support_and_then_the_query_and_copies_are_merged():
    task = over_tasks(maml(TASK, optax.sgd(0.1), 2), 3)
    batch = jax.tree.map(lambda x: jnp.stack([x] * 3), BATCH)
    _, aux = jax.jit(task.loss)(VARIABLES, batch, KEY)
    assert aux.state["inputs"]["seen"] == 3 * (2 * 4 + 4)
    one = maml(TASK, optax.sgd(0.1), 2).loss(VARIABLES, BATCH, KEY)[1]
    np.testing.assert_allclose(aux.state["inputs"]["mean"], one.state["inputs"]["mean"], rtol=1e-5)


def test_a_query_is_split_and_the_support_is_not():
    task = maml(TASK, optax.sgd(0.3), 2, support=6)
    assert task.batch["support"]["inputs"] == Spec((6, 3), jnp.float32, ("inner_batch", "features"))
    batch = {**BATCH, "support": rows(KEY, 6)}
    found = [jax.jit(lambda b, e=e: e.grads({}, task, VARIABLES, b, KEY))(batch) for e in (exact(), accumulated(2))]
    close((found[0][0], found[0][2]), (found[1][0], found[1][2]))


def test_anil_moves_the_head_alone_and_learns_the_rest():
    task = anil(TASK, optax.sgd(0.3), 2)
    end = task.methods["adapt"].apply(VARIABLES, {"support": BATCH["support"]}, KEY)["params"]
    np.testing.assert_array_equal(end["trunk"]["kernel"], PARAMS["trunk"]["kernel"])
    assert (end["head"]["kernel"] != PARAMS["head"]["kernel"]).any()
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(gradient_of(task)))
    close(gradient_of(anil(TASK, optax.sgd(0.3), 3, adapts="")), by_hand(3))


def test_meta_sgd_is_maml_at_first_and_its_rates_have_the_published_gradient():
    task = meta_sgd(TASK, 0.3)
    variables = {**VARIABLES, "params": {"task": PARAMS, "rates": jax.tree.map(lambda p: jnp.full_like(p, 0.3), PARAMS)}}
    np.testing.assert_array_equal(jax.tree.leaves(task.init(KEY)["params"]["rates"])[0], jnp.float32(0.3))
    found = gradient_of(task, variables)
    close(found["task"], by_hand(1))
    support, query = jax.grad(plain)(PARAMS, BATCH["support"]), jax.grad(plain)(moved(PARAMS, 0.3), BATCH["query"])
    close(found["rates"], jax.tree.map(lambda s, q: -s * q, support, query))  # d/da of L(p - a g) is -g L'


def test_cavia_moves_the_context_alone_from_zero():
    wide = small_classifier(batch=4, features=5)
    task, variables = cavia(wide, 2, optax.sgd(0.7)), wide.init(KEY)
    assert task.batch["query"]["inputs"].shape == (4, 3)

    def loss(context, batch):
        x = jnp.concatenate([batch["inputs"], jnp.broadcast_to(context[None], (4, 2))], 1)
        return wide.loss(variables, {**batch, "inputs": x}, KEY)[0]

    context = -0.7 * jax.grad(loss)(jnp.zeros(2), BATCH["support"])
    found = task.methods["adapt"].apply(variables, {"support": BATCH["support"]}, KEY)["params"]
    np.testing.assert_allclose(found["context"], context, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, found["task"], variables["params"])
    np.testing.assert_allclose(task.loss(variables, BATCH, KEY)[0], loss(context, BATCH["query"]), rtol=1e-5)


def test_reptile_moves_to_where_the_steps_end_and_over_tasks_to_their_mean():
    batch = jax.tree.map(lambda *x: jnp.stack(x), BATCH["support"], BATCH["query"], BATCH["support"])
    task = reptile(TASK, optax.sgd(0.3), 3)
    end = PARAMS
    for part in ("support", "query", "support"):
        end = moved(end, 0.3, batch=BATCH[part])
    close(gradient_of(task, batch=batch), jax.tree.map(jnp.subtract, PARAMS, end))
    value, aux = task.loss(VARIABLES, batch, KEY)
    np.testing.assert_allclose(value, aux.metrics["support_loss"][0], rtol=1e-6)
    two = over_tasks(task, 2)
    other = jax.tree.map(lambda x: x[::-1], batch)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), batch, other)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, gradient_of(task, batch=batch), gradient_of(task, batch=other))
    close(gradient_of(two, batch=both), mean)


def least_squares():
    """|A p - b|^2 / 2 + p'Bp / 2, with the batch giving A, b: a minimum in closed form."""

    def loss(variables, batch, key):
        p = variables["params"]["p"]
        return ((batch["a"] @ p - batch["b"]) ** 2).sum() / 2, Aux(variables["state"], {}, None)

    specs = {"a": Spec((5, 3), jnp.float32), "b": Spec((5,), jnp.float32)}
    return Task(lambda key: {"params": {"p": jax.random.normal(key, (3,))}, "state": {}, "frozen": {}}, loss, {}, specs)


@pytest.mark.parametrize("solver, options", [("cg", {"iterations": 6}), ("neumann", {"iterations": 400, "rate": 0.05})])
def test_imaml_has_the_gradient_of_the_minimum(solver, options):
    with jax.enable_x64(True):
        draw = [jax.random.normal(jax.random.key(i), (5, 4), jnp.float64) for i in (1, 2)]
        support, query = ({"a": d[:, :3], "b": d[:, 3]} for d in draw)
        task = imaml(least_squares(), optax.sgd(0.05), 800, strength=2.0, solver=solver, **options)
        start = jax.random.normal(KEY, (3,), jnp.float64)

        def loss(p):
            variables = {"params": {"p": p}, "state": {}, "frozen": {}}
            return task.loss(variables, {"support": support, "query": query}, KEY)[0]

        hessian = support["a"].T @ support["a"]
        end = jnp.linalg.solve(hessian + 2 * jnp.eye(3), support["a"].T @ support["b"] + 2 * start)
        at_the_end = query["a"].T @ (query["a"] @ end - query["b"])
        wanted = jnp.linalg.solve(jnp.eye(3) + hessian / 2, at_the_end)  # Rajeswaran et al. 2019, equation 6
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(start), wanted, rtol=1e-6)


@pytest.mark.slow
def test_a_start_is_learned_from_which_a_step_goes_far():
    family = families()["sinusoids"]
    task = over_tasks(maml(family.task({}), optax.sgd(0.05)), 8)
    task = drawn(task, episodes(family, 8, 4, 4))
    tx = optax.adam(0.02)

    @jax.jit
    def run(variables):
        def step(carry, key):
            params, opt = carry
            loss = lambda p: task.loss({**variables, "params": p}, {}, key)[0]  # noqa: E731
            value, grads = jax.value_and_grad(loss)(params)
            updates, opt = tx.update(grads, opt)
            return (optax.apply_updates(params, updates), opt), value

        start = (variables["params"], tx.init(variables["params"]))
        return jax.lax.scan(step, start, jax.random.split(KEY, 400))[1]

    losses = run(task.init(KEY))
    assert losses[-50:].mean() < 0.8 * losses[:50].mean()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: maml(TASK, steps=0), "maml: steps=0; allowed: 1 or more"),
        (lambda: maml(TASK, order="frist"), "maml: order='frist' is unknown; allowed: first, second; nearest: 'first'"),
        (lambda: maml(TASK, steps=2, truncation=3), "maml: truncation=3; allowed: 1 to steps=2"),
        (lambda: maml(TASK, steps=2, order="first", truncation=1), "maml: truncation=1; allowed: 1 to steps=2 of the second"),
        (lambda: maml(TASK, support=0), "maml: support=0; allowed: 1 or more, or None"),
        (lambda: anil(TASK, adapts="haed"), "anil: adapts='haed' is in no path of params; they are head/bias"),
        (lambda: anil(TASK, adapts="(h"), r"anil: adapts='\(h' is no regular expression"),
        (lambda: cavia(TASK, 3), r"cavia: size=3: the task's inputs has the shape \(4, 3\); its last axis must be longer"),
        (lambda: cavia(TASK, 0), "cavia: size=0; allowed: 1 or more"),
        (lambda: cavia(TASK, 1, into="input"), "cavia: into='input' is unknown; .* nearest: 'inputs'"),
        (lambda: imaml(TASK, solver="gc"), "imaml: solver='gc' is unknown; allowed: cg, neumann"),
        (lambda: imaml(TASK, strength=0.0), "imaml: strength=0.0; allowed: above 0"),
        (lambda: imaml(TASK, iterations=0), "imaml: iterations=0; allowed: 1 or more"),
        (lambda: reptile(TASK, steps=0), "reptile: steps=0; allowed: 1 or more"),
        *(
            (lambda method=method, more=more: method(TASK, *more, 0.1), "inner_tx=0.1; allowed: an optax transformation")
            for method, more in ((maml, ()), (anil, ()), (cavia, (1,)), (reptile, ()), (imaml, ()))
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
