"""A transformer's training step, ours beside torch's, eager and compiled: the same model, weights, batch and optimizer.

4 layers x 256, 4 heads x 64, length 512, batch 8, vocabulary 256, squared ReLU, RMS norm, rotary positions, AdamW, float32.
Ours is `models.transformer` in `learners.gradient`, stepped by the loop's own program. Losses of three steps agree to 1e-4
before anything is timed. Both sides may use the processors that this process may.
"""

from __future__ import annotations

import os

from research.core.memory import keep_freed_memory

keep_freed_memory()  # as `gnomon train` does, before JAX runs anything

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.harness import compare, run  # noqa: E402
from research.core.loop import compiled, owned  # noqa: E402
from research.learners import gradient  # noqa: E402
from research.models import transformer  # noqa: E402
from research.tasks import language_model  # noqa: E402

NEEDS_PEERS = True
VOCAB, WIDTH, HEADS, LAYERS, LENGTH, BATCH = 256, 256, 4, 4, 512, 8
RATE, DECAY = 3e-4, 0.1
SCANNED = 4  # steps in one dispatch of the side that has several


def task(implementation: str):
    model = transformer(
        vocab=VOCAB, context=LENGTH, width=WIDTH, layers=LAYERS, heads=HEADS, kv_heads=HEADS, head_dim=0,
        attention={"mask": ["full()"], "implementation": implementation}, rope_base=1e4, qk_norm=0.0, mlp="squared_relu",
        mlp_width=4 * WIDTH, norm="rms", conv=0, dropout=0.0, ngrams=[], ngram_bits=1, ngram_width=1, induction=[], copy=False,
        tie_embeddings=False, embed_scale=1.0, embed_norm=False, zero_init=False, dtype="float32", scan_layers=False,
        remat=["none"],
    )  # fmt: skip
    return language_model(model, batch=BATCH, length=LENGTH, label_smoothing=0.0, z_loss=0.0)


class Ours:
    """`steps` steps in one call, from the weights that key 0 gives."""

    def __init__(self, implementation: str, steps: int, batch: dict[str, np.ndarray]):
        learner = gradient(task(implementation), optax.adamw(RATE, weight_decay=DECAY))
        self.program, self.steps = compiled(learner, None), steps
        self.state = owned(self.program.init(jax.random.key(0), None), self.program.abstract)
        self.batches = self.program.put(jax.tree.map(lambda x: np.stack([x] * steps), batch))

    def __call__(self) -> list[float]:
        self.state, metrics = self.program.step(self.state, self.batches, self.steps, jax.random.key(1))
        total, weight = jax.device_get(metrics["loss"])
        return list(total / weight)


class TorchLayer(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.names = {
            "query": "attention",
            "key": "attention",
            "value": "attention",
            "out": "attention",
            "up": "mlp",
            "down": "mlp",
        }
        self.norm1, self.norm2 = (nn.RMSNorm(WIDTH, eps=1e-6) for _ in range(2))
        kernels = {name: weights[group][name]["kernel"] for name, group in self.names.items()}
        kernels["qkv"] = np.concatenate([kernels.pop(name) for name in ("query", "key", "value")], axis=1)
        for name, kernel in kernels.items():
            layer = nn.Linear(*kernel.shape, bias=False)
            layer.weight.data = torch.from_numpy(np.ascontiguousarray(kernel.T))
            self.add_module(name, layer)

    def forward(self, x, cos, sin):
        def rotate(x):
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        q, k, v = self.qkv(self.norm1(x)).view(BATCH, LENGTH, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.out(read.transpose(1, 2).reshape(x.shape))
        return x + self.down(torch.relu(self.up(self.norm2(x))).square())


class TorchModel(nn.Module):
    def __init__(self, params):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.from_numpy(params["embed"]["table"].copy()), freeze=False)
        self.layers = nn.ModuleList(TorchLayer(params["blocks"][str(i)]) for i in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight.data = torch.from_numpy(np.ascontiguousarray(params["head"]["kernel"].T))
        half = WIDTH // HEADS // 2
        angle = torch.arange(LENGTH)[:, None] * 1e4 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, inputs, targets):
        x = self.embed(inputs)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Torch:
    def __init__(self, params, batch, compile_: bool):
        self.data = [torch.from_numpy(batch[name]).long() for name in ("inputs", "targets")]
        model = TorchModel(params)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
        self.loss = torch.compile(model) if compile_ else model

    def __call__(self) -> list[float]:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(*self.data)
        loss.backward()
        self.optimizer.step()
        return [loss.item()]


def main() -> list[dict]:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    batch = {"inputs": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy(), "mask": np.ones((BATCH, LENGTH), np.float32)}

    def sides():
        first = Ours("", 1, batch)
        params = jax.tree.map(np.asarray, first.state["params"])
        return {
            "ours": first,
            "torch eager": Torch(params, batch, False),
            "torch compiled": Torch(params, batch, True),
            "ours, reference attention": Ours("reference", 1, batch),
        }

    losses = {name: [side()[0] for _ in range(3)] for name, side in sides().items()}
    for name, found in losses.items():
        np.testing.assert_allclose(found, losses["ours"], atol=1e-4, err_msg=name)
    rows = [compare(f"a step, {LAYERS} x {WIDTH}, {BATCH} x {LENGTH} tokens", sides(), rounds=10)]
    scanned = Ours("", SCANNED, batch)
    rows.append(
        compare(f"{SCANNED} steps", {"ours, one dispatch": scanned, "ours, one by one": _times(SCANNED, sides()["ours"])})
    )
    return rows


def _times(n: int, side):
    return lambda: [side() for _ in range(n)]


if __name__ == "__main__":
    run(main)
