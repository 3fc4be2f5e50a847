"""Learning what an inner problem is trained with: rates, penalties, weights of data, losses, architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from research.core.axes import replicated
from research.core.contracts import abstract_key, abstract_variables, check_same
from research.core.names import choose
from research.core.types import Array, Aux, Batch, Example, Key, Method, Task, Tree, Variables
from research.transforms._example import small_classifier
from research.transforms._implicit import Solver, as_minimum, check_solver, conjugate_gradients, neumann_series
from research.transforms._inner_loop import Inner, InnerLoss, begin, inner_loop, stacked
from research.transforms._trees import axes_of, by_step, packed, unpacked

Form = Callable[[InnerLoss, optax.GradientTransformation, Inner, Callable[[Array], Batch], Key], tuple[Inner, Array]]


def bilevel(
    inner: Task,
    outer: Task | None,
    inner_tx: Callable[[Tree], optax.GradientTransformation],
    steps: int,
    *,
    hypergradient: str = "unrolled",
    restart: bool = False,
    last: int | None = None,
    iterations: int = 10,
    rate: float = 0.1,
    remat: bool = False,
) -> Task:
    """The outer loss after `steps` steps on the inner one, as a function of hyperparameters.

    Both tasks have params {"inner": what the steps move, "outer": the hyperparameters} (`hyper` makes such a task), and
    Variables of the same form. `inner_tx` makes the inner optimizer of the hyperparameters, so its rates may be among them.
    Batches are {"train": the inner task's, with a first axis [steps, ...], "validation": the outer task's}.

    outer: None where the loss is the mean of the inner losses, each before its step, of the `last` of them or of all; batches
        are then {"train"}, and the hypergradient is "unrolled".
    hypergradient:
        unrolled     through all steps: exact (Maclaurin et al. 2015, arXiv 1502.03492, forwards in memory)
        one_step     through the last step alone (Bolte et al. 2023, arXiv 2305.13768)
        implicit_cg  that of the minimum of the inner loss on the last batch, by `iterations` of conjugate gradients: exact at
                     a minimum (Pedregosa 2016, arXiv 1602.02355); 0 for what only `inner_tx` reads
        neumann      the same by as many terms of a Neumann series at `rate` (Lorraine et al. 2020, arXiv 1911.02590)
    restart: each loss begins with inner params drawn anew; otherwise where the last one ended, as in online tuning and DARTS.
    remat: unrolled keeps what each step begins with, and computes the rest again in its backward pass.

    Variables: params, the hyperparameters; state {"inner", "opt", "task"}, where the steps have ended, the optimizer's state by
    path and the tasks' own; frozen, the tasks'. Metrics: the outer task's, and "inner_loss", their mean over the steps.
    Aux.weight is None. Methods: the outer task's with the inner params in the state.

    Raises ValueError (one line): steps, last or iterations that cannot be, an unknown hypergradient, tasks of other forms, an
    `inner_tx` that is no function.
    """
    if steps < 1:
        raise ValueError(f"bilevel: steps={steps}; allowed: 1 or more")
    if not callable(inner_tx):
        raise ValueError(
            f"bilevel: inner_tx is a {type(inner_tx).__name__}; allowed: a function of the hyperparameters that makes an optax "
            "transformation, such as lambda hyper: optax.sgd(0.1)"
        )
    if last is not None and (outer is not None or not 1 <= last <= steps):
        raise ValueError(f"bilevel: last={last}; allowed: 1 to steps={steps} where outer is None, else None")
    check_solver("bilevel", iterations, rate)
    form = choose(_forms(steps, iterations, rate, remat), hypergradient, "bilevel: hypergradient")
    if outer is None and hypergradient != "unrolled":
        raise ValueError(f"bilevel: hypergradient={hypergradient!r} needs an outer task; allowed without one: unrolled")
    abstract = abstract_variables(inner)
    if set(abstract["params"]) != {"inner", "outer"}:
        raise ValueError(f"bilevel: params of the inner task have the keys {sorted(abstract['params'])}; allowed: inner, outer")
    if outer is not None:
        check_same(abstract, abstract_variables(outer), "bilevel: Variables of the outer task")

    def begun(hyper: Tree, key: Key) -> Inner:
        fresh = inner.init(key)
        return begin(inner_tx(hyper), fresh["params"]["inner"], fresh["state"])

    def resumed(variables: Variables, key: Key) -> Inner:
        state, hyper = variables["state"], variables["params"]
        like = jax.eval_shape(lambda p: inner_tx(hyper).init(p), state["inner"])
        return Inner(state["inner"], state["task"], unpacked(state["opt"], like))

    def drawn_anew(variables: Variables, key: Key) -> Inner:
        return begun(variables["params"], key)

    start = drawn_anew if restart else resumed

    def kept(ended: Inner, task_state: Tree) -> Tree:
        return {"inner": ended.params, "task": task_state, **packed(ended.opt)}

    def whole(variables: Variables, params: Tree, state: Tree) -> Variables:
        return {"params": {"inner": params, "outer": variables["params"]}, "state": state, "frozen": variables["frozen"]}

    def init(key: Key) -> Variables:
        k_outer, k_inner = jax.random.split(key)
        variables = inner.init(k_outer)
        first = begun(variables["params"]["outer"], k_inner)
        return {"params": variables["params"]["outer"], "state": kept(first, first.state), "frozen": variables["frozen"]}

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
        k_start, k_inner, k_outer = jax.random.split(key, 3)

        def inner_loss(params: Tree, state: Tree, batch: Batch, key: Key) -> tuple[Array, Aux]:
            return inner.loss(whole(variables, params, state), batch, key)

        tx, first = inner_tx(variables["params"]), start(variables, k_start)
        ended, losses = form(inner_loss, tx, first, stacked(batch["train"]), k_inner)
        value, aux = closing(variables, ended, losses, batch, k_outer)
        mean = losses.mean()
        metrics = {**aux.metrics, "inner_loss": (mean, jnp.ones_like(mean))}
        return value, Aux(kept(ended, aux.state), metrics, None)

    def validated(variables: Variables, ended: Inner, losses: Array, batch: Batch, key: Key) -> tuple[Array, Aux]:
        assert outer is not None
        return outer.loss(whole(variables, ended.params, ended.state), batch["validation"], key)

    def averaged(variables: Variables, ended: Inner, losses: Array, batch: Batch, key: Key) -> tuple[Array, Aux]:
        return losses[-(last or steps) :].mean(), Aux(ended.state, {}, None)

    closing = averaged if outer is None else validated
    asked = inner if outer is None else outer

    def lifted(method: Method) -> Method:
        def apply(variables: Variables, inputs: Tree, key: Key) -> Tree:
            return method.apply(whole(variables, variables["state"]["inner"], variables["state"]["task"]), inputs, key)

        return method._replace(apply=apply)

    own = axes_of(inner)
    moved = {"inner": own["params"]["inner"], "task": own["state"]}
    opt = jax.eval_shape(init, abstract_key())["state"]["opt"]
    axes = {"params": own["params"]["outer"], "state": {**moved, "opt": replicated(opt)}, "frozen": own["frozen"]}
    batch = {"train": by_step(inner.batch, steps)} | ({} if outer is None else {"validation": outer.batch})
    merge = {f"task/{path}": rule for path, rule in inner.merge.items()}
    return Task(init, loss, {name: lifted(m) for name, m in asked.methods.items()}, batch, axes, merge)


def _forms(steps: int, iterations: int, rate: float, remat: bool) -> Mapping[str, Form]:
    def unrolled(loss, tx, first, batch, key):
        return inner_loop(loss, tx, first, batch, key, range(steps), remat=remat)

    def one_step(loss, tx, first, batch, key):
        before, losses = inner_loop(loss, tx, first, batch, key, range(steps - 1))
        ended, final = inner_loop(loss, tx, jax.lax.stop_gradient(before), batch, key, range(steps - 1, steps))
        return ended, jnp.concatenate([losses, final])

    def implicit(solver: Solver) -> Form:
        def at_the_minimum(loss, tx, first, batch, key):
            ended, losses = jax.lax.stop_gradient(inner_loop(loss, tx, first, batch, key, range(steps)))
            final, k_final = batch(jnp.asarray(steps - 1)), jax.random.fold_in(key, steps - 1)

            def gradient(params):
                return jax.grad(lambda p: loss(p, ended.state, final, k_final)[0])(params)

            return ended._replace(params=as_minimum(gradient, ended.params, solver)), losses

        return at_the_minimum

    return {
        "unrolled": unrolled,
        "one_step": one_step,
        "implicit_cg": implicit(conjugate_gradients(iterations, rate)),
        "neumann": implicit(neumann_series(iterations, rate)),
    }


def hyper(task_of: Callable[[Tree], Task], init: Callable[[Key], Tree]) -> Task:
    """A task with params {"inner": those of `task_of(hyperparameters)`, "outer": the hyperparameters, begun by `init(key)`},
    as `bilevel` takes them. `task_of` may be given traced arrays; the tasks it makes differ in their loss alone."""
    plain = task_of(init(jax.random.key(0)))

    def own(variables: Variables) -> Variables:
        return {**variables, "params": variables["params"]["inner"]}

    def begin(key: Key) -> Variables:
        k_task, k_outer = jax.random.split(key)
        variables = plain.init(k_task)
        return {**variables, "params": {"inner": variables["params"], "outer": init(k_outer)}}

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
        return task_of(variables["params"]["outer"]).loss(own(variables), batch, key)

    def lifted(name: str, method: Method) -> Method:
        def apply(variables: Variables, inputs: Tree, key: Key) -> Tree:
            return task_of(variables["params"]["outer"]).methods[name].apply(own(variables), inputs, key)

        return method._replace(apply=apply)

    axes = axes_of(plain)
    outer_axes = replicated(jax.eval_shape(init, abstract_key()))
    axes = {**axes, "params": {"inner": axes["params"], "outer": outer_axes}}
    return plain._replace(init=begin, loss=loss, methods={n: lifted(n, m) for n, m in plain.methods.items()}, axes=axes)


def decayed(task: Task, strength: Array) -> Task:
    """The task with strength / 2 x the squared params added to its loss."""

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
        value, aux = task.loss(variables, batch, key)
        return value + strength / 2 * jnp.asarray(sum((p**2).sum() for p in jax.tree.leaves(variables["params"]))), aux

    return task._replace(loss=loss)


def example() -> Example:
    """The rate and the weight decay of a classifier."""
    plain = small_classifier(batch=4)

    def start(key: Key) -> Tree:
        return {"log_rate": jnp.full((), -1.0), "log_decay": jnp.full((), -2.0)}

    inner = hyper(lambda h: decayed(plain, jnp.exp(h["log_decay"])), start)
    outer = hyper(lambda h: plain, start)
    return Example(bilevel(inner, outer, lambda h: optax.sgd(jnp.exp(h["log_rate"]), momentum=0.5), 3))
