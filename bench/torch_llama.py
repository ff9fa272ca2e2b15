"""The peer: a Llama training loop in PyTorch on the CPU, at the settings found best for it.

usage: torch_llama.py PRESET [--precision fp32|mixed] [--batch B] [--threads N] [--steps N] [--compile]

Fused AdamW, scaled-dot-product attention; mixed is autocast to bfloat16, the loss in fp32. Prints
one line; the first two steps warm up (and compile) and are not counted.
"""

import argparse
import time

import pinned

pinned.enter()
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

PRESETS = {  # dim, layers, heads, kv_heads, hidden, vocab, context
    "260k": (64, 5, 8, 4, 172, 512, 512),
    "15m": (288, 6, 6, 6, 768, 32000, 256),
    "42m": (512, 8, 8, 8, 1376, 32000, 1024),
    "110m": (768, 12, 12, 12, 2048, 32000, 1024),
}


class Norm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Block(nn.Module):
    def __init__(self, dim, heads, kv_heads, hidden):
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, kv_heads, dim // heads
        self.norm1, self.norm2 = Norm(dim), Norm(dim)
        linear = lambda i, o: nn.Linear(i, o, bias=False)
        self.q, self.o = linear(dim, dim), linear(dim, dim)
        self.k, self.v = (linear(dim, kv_heads * self.head) for _ in range(2))
        self.gate, self.up, self.down = linear(dim, hidden), linear(dim, hidden), linear(hidden, dim)

    def forward(self, x, cos, sin):
        b, t, d = x.shape
        y = self.norm1(x)
        q = rotate(self.q(y).view(b, t, self.heads, self.head).transpose(1, 2), cos, sin)
        k = rotate(self.k(y).view(b, t, self.kv_heads, self.head).transpose(1, 2), cos, sin)
        v = self.v(y).view(b, t, self.kv_heads, self.head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, d))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, dim, layers, heads, kv_heads, hidden, vocab, context):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, kv_heads, hidden) for _ in range(layers))
        self.norm, self.out = Norm(dim), nn.Linear(dim, vocab, bias=False)
        head = dim // heads
        rates = 10000.0 ** (-torch.arange(0, head, 2).double() / head)
        angles = torch.outer(torch.arange(context).double(), rates)
        self.register_buffer("cos", angles.cos().float())
        self.register_buffer("sin", angles.sin().float())

    def forward(self, x, y):
        h = self.embedding(x)
        for block in self.blocks:
            h = block(h, self.cos, self.sin)
        return F.cross_entropy(self.out(self.norm(h)).flatten(0, 1).float(), y.flatten())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--precision", choices=["fp32", "mixed"], default="fp32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    sizes = PRESETS[args.preset]
    vocab, context = sizes[5:]
    model = Llama(*sizes)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=5e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True
    )
    forward = torch.compile(model) if args.compile else model
    generator = torch.Generator().manual_seed(1)
    times = []
    for _ in range(args.steps + 2):
        tokens = torch.randint(0, vocab, (args.batch, context + 1), generator=generator)
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.precision == "mixed"):
            loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    median = sorted(times[2:])[args.steps // 2]
    kind = "compiled" if args.compile else "eager"
    print(
        f"torch {torch.__version__} {args.preset} {args.precision} {kind} threads={args.threads} "
        f"batch={args.batch}x{context} loss={loss.item():.4f} step={median * 1e3:.0f}ms "
        f"tok/s={args.batch * context / median:.0f}"
    )


main()
