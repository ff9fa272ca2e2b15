"""Makes the goldens: a tiny Llama trained ten steps by PyTorch in float64.

usage: python3 tests/golden/make.py

Writes golden.json (shape, recipe, batches, losses, norms) and golden.safetensors (weights
before and after, gradients of the first step) beside itself. The model is written here from
the paper's formulas and differentiated by autograd; optimiser and clipping are PyTorch's own.
"""

import json
import math
import struct
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "bench"))
import pinned  # noqa: E402

pinned.enter()
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

SHAPE = dict(dim=24, layers=2, heads=4, kv_heads=2, hidden=20, vocab=37, context=32,
             norm_eps=1e-5, rope_theta=10000.0)
RECIPE = dict(steps=10, warmup_steps=3, learning_rate=0.01, final_ratio=0.1, beta1=0.9, beta2=0.95,
              epsilon=1e-5, weight_decay=0.1, clip_norm=1.0, non_finite="stop")
SEQUENCES, LENGTH = 3, 17
HEAD = SHAPE["dim"] // SHAPE["heads"]
# The shape's epsilon is a float32 on our side.
EPS = struct.unpack("f", struct.pack("f", SHAPE["norm_eps"]))[0]


def parameters():
    """Names and shapes as in Hugging Face's LlamaForCausalLM."""
    d, h, v, kv = SHAPE["dim"], SHAPE["hidden"], SHAPE["vocab"], SHAPE["kv_heads"] * HEAD
    yield "model.embed_tokens.weight", (v, d)
    for i in range(SHAPE["layers"]):
        for part, shape in [
            ("input_layernorm", (d,)), ("self_attn.q_proj", (d, d)), ("self_attn.k_proj", (kv, d)),
            ("self_attn.v_proj", (kv, d)), ("self_attn.o_proj", (d, d)),
            ("post_attention_layernorm", (d,)), ("mlp.gate_proj", (h, d)), ("mlp.up_proj", (h, d)),
            ("mlp.down_proj", (d, h)),
        ]:
            yield f"model.layers.{i}.{part}.weight", shape
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (v, d)


def initial(generator):
    """Values that float32 holds exactly, large enough that attention is not flat."""
    for name, shape in parameters():
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2
        values = values + 1 if len(shape) == 1 else values
        yield name, values.float().double().requires_grad_()


def rms_norm(x, gain):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * gain


def rotate(x):
    """Hugging Face's layout: halves, not neighbours. x: [sequence, head, position, HEAD]."""
    rates = SHAPE["rope_theta"] ** (-torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
    angles = torch.outer(torch.arange(x.shape[2], dtype=torch.float64), rates)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., : HEAD // 2], x[..., HEAD // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(w, prefix, x, starts):
    s, t, _ = x.shape
    split = lambda name, heads: (x @ w[f"{prefix}.{name}.weight"].T).view(s, t, heads, HEAD).transpose(1, 2)
    q, k, v = split("q_proj", SHAPE["heads"]), split("k_proj", SHAPE["kv_heads"]), split("v_proj", SHAPE["kv_heads"])
    q, k = rotate(q), rotate(k)
    group = SHAPE["heads"] // SHAPE["kv_heads"]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    position = torch.arange(t)
    seen = (position[None, None, :] <= position[None, :, None]) & (position[None, None, :] >= starts[:, :, None])
    scores = (q @ k.transpose(-1, -2) / math.sqrt(HEAD)).masked_fill(~seen[:, None], -math.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(s, t, -1)
    return out @ w[f"{prefix}.o_proj.weight"].T


def loss(w, batch):
    tokens, targets, counted, starts = batch
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(SHAPE["layers"]):
        p = f"model.layers.{i}"
        x = x + attention(w, f"{p}.self_attn", rms_norm(x, w[f"{p}.input_layernorm.weight"]), starts)
        y = rms_norm(x, w[f"{p}.post_attention_layernorm.weight"])
        y = F.silu(y @ w[f"{p}.mlp.gate_proj.weight"].T) * (y @ w[f"{p}.mlp.up_proj.weight"].T)
        x = x + y @ w[f"{p}.mlp.down_proj.weight"].T
    logits = rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T
    return F.cross_entropy(logits[counted], targets[counted])


def batch(generator):
    """Sequences of documents; about a quarter of the targets does not count."""
    shape = (SEQUENCES, LENGTH)
    tokens, targets = (torch.randint(0, SHAPE["vocab"], shape, generator=generator) for _ in range(2))
    counted = torch.rand(shape, generator=generator) < 0.75
    border = torch.rand(shape, generator=generator) < 0.15
    position = torch.arange(LENGTH).expand(shape)
    starts = torch.where(border, position, 0).cummax(1).values
    return tokens, targets, counted, starts


def learning_rate(step):
    """Linear warm-up, then half a cosine to the final share of the peak at the last step."""
    r = RECIPE
    if step < r["warmup_steps"]:
        return r["learning_rate"] * step / r["warmup_steps"]
    done = (step - r["warmup_steps"]) / (r["steps"] - r["warmup_steps"])
    low = r["final_ratio"] * r["learning_rate"]
    return low + (r["learning_rate"] - low) * (1 + math.cos(math.pi * done)) / 2


def main():
    generator = torch.Generator().manual_seed(2307_09288)
    w = dict(initial(generator))
    tensors = {f"before.{name}": value.detach().clone() for name, value in w.items()}
    groups = [
        dict(params=[p for p in w.values() if p.dim() > 1], weight_decay=RECIPE["weight_decay"]),
        dict(params=[p for p in w.values() if p.dim() == 1], weight_decay=0.0),
    ]
    betas = (RECIPE["beta1"], RECIPE["beta2"])
    optimiser = torch.optim.AdamW(groups, betas=betas, eps=RECIPE["epsilon"])
    steps = []
    for step in range(1, RECIPE["steps"] + 1):
        data = batch(generator)
        value = loss(w, data)
        value.backward()
        if step == 1:
            tensors |= {f"gradient.{name}": p.grad.clone() for name, p in w.items()}
        norm = torch.nn.utils.clip_grad_norm_(w.values(), RECIPE["clip_norm"])
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step)
        optimiser.step()
        optimiser.zero_grad()
        tokens, targets, counted, starts = (part.flatten().tolist() for part in data)
        steps.append(dict(tokens=tokens, targets=targets, counted=counted, document_start=starts,
                          loss=value.item(), norm=norm.item()))
        print(f"step {step}: loss {value.item():.6f}, norm {norm.item():.4f}, rate {learning_rate(step):.5f}")
    tensors |= {f"after.{name}": value.detach().clone() for name, value in w.items()}
    save_file(tensors, HERE / "golden.safetensors")
    golden = dict(made_with=f"torch {torch.__version__}", shape=SHAPE, recipe=RECIPE, sequences=SEQUENCES,
                  length=LENGTH, steps=steps)
    (HERE / "golden.json").write_text(json.dumps(golden) + "\n")


main()
