"""Makes the goldens: what Hugging Face's LlamaForCausalLM computes, in float64.

usage: python3 tests/golden/make.py [CASE…]

For each case, writes CASE.json (shape, recipe, and of each of ten optimiser steps loss and norm)
and CASE.safetensors (logits and gradients of the first step, weights after the last) beside
itself. worker/engine/tests/golden.rs compares. The model is the transformers library's, with
eager attention, at the version that bench/pinned.py pins; loss, gradients, clipping and AdamW
are PyTorch's own.

Really float64: transformers rounds to float32 in three places, whatever a model's type is
(RMSNorm, the angles of the rotary embedding, the softmax of attention). Under `Wide`, its code
runs as it stands, but what it asks for in float32 it gets in float64; under `Watch`, anything
narrower that any operation makes, forward or backward, is an error.

Small files: weights and batches come from a generator that both sides have, SplitMix64, and of
a tensor with more than RAW elements only a sketch is kept: element i goes, with a random sign, to
the sum i mod SKETCH. That is linear, so the sketch of a difference is the difference of the
sketches; its norm estimates the norm of the difference without bias, within 5 % in two cases of
three; and a single wrong element is not diminished at all.
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
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

RAW, SKETCH = 1024, 256
SEED = 2307_09288
RECIPE = dict(steps=10, warmup_steps=3, learning_rate=0.003, final_ratio=0.1, beta1=0.9, beta2=0.95,
              epsilon=1e-5, weight_decay=0.1, clip_norm=1.0, non_finite="stop")
# The shape's epsilon is a float32 on our side.
EPS = struct.unpack("f", struct.pack("f", 1e-5))[0]


def case(dim, layers, heads, kv_heads, hidden, vocab, sequences, length):
    shape = dict(dim=dim, layers=layers, heads=heads, kv_heads=kv_heads, hidden=hidden, vocab=vocab,
                 context=length + 1, norm_eps=1e-5, rope_theta=10000.0)
    return dict(shape=shape, sequences=sequences, length=length)


# Head sizes 16 to 128, KV heads 8, 2 and 1; odd vocabularies, lengths and batches; more rows than
# a block of a summed dimension (256); sequences shorter and longer than a block of queries (48).
CASES = dict(
    small=case(32, 2, 2, 1, 20, 31, sequences=3, length=17),
    heads8_kv8_size16=case(128, 2, 8, 8, 44, 61, sequences=5, length=33),
    heads8_kv2_size16=case(128, 2, 8, 2, 92, 101, sequences=1, length=127),
    heads8_kv1_size32=case(256, 1, 8, 1, 52, 97, sequences=3, length=65),
    heads4_kv2_size64=case(256, 2, 4, 2, 68, 131, sequences=7, length=17),
    heads2_kv1_size128=case(256, 1, 2, 1, 84, 67, sequences=3, length=127),
)


class Wide(TorchFunctionMode):
    """Whoever asks for float32 gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wide = lambda x: torch.float64 if x is torch.float32 else x
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


class Watch(TorchDispatchMode):
    """Everything that is computed is float64, or no floating-point number at all."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                assert tensor.dtype is torch.float64, f"{func} computes in {tensor.dtype}"
        return out


def numbers(seed, n):
    """The first n numbers of SplitMix64."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.uint64(0x9E37_79B9_7F4A_7C15) * np.arange(1, n + 1, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
        return z ^ (z >> np.uint64(31))


def parameters(shape):
    """Names and shapes, in the order of our flat model."""
    d, h, v = shape["dim"], shape["hidden"], shape["vocab"]
    kv = shape["kv_heads"] * d // shape["heads"]
    yield "model.embed_tokens.weight", (v, d)
    for i in range(shape["layers"]):
        for part, size in [
            ("input_layernorm", (d,)), ("self_attn.q_proj", (d, d)), ("self_attn.k_proj", (kv, d)),
            ("self_attn.v_proj", (kv, d)), ("self_attn.o_proj", (d, d)),
            ("post_attention_layernorm", (d,)), ("mlp.gate_proj", (h, d)), ("mlp.up_proj", (h, d)),
            ("mlp.down_proj", (d, h)),
        ]:
            yield f"model.layers.{i}.{part}.weight", size
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (v, d)


def initial(shape):
    """Values that bfloat16 holds, so that every precision starts from the same: 8-bit integers,
    scaled to about [-1, 1) / √columns; queries and keys twice that, so that attention is far
    from flat; the embedding to [-1, 1), so that the norms have something to do; gains around 1."""
    sizes = list(parameters(shape))
    bits = numbers(SEED, sum(math.prod(size) for _, size in sizes))
    start = 0
    for name, size in sizes:
        part = bits[start : start + math.prod(size)].reshape(size)
        start += part.size
        if len(size) == 1:
            value = 1 + ((part >> np.uint64(58)).astype(np.float64) - 32) / 128
        else:
            scale = 1 if "embed" in name else 2.0 ** -(size[1].bit_length() // 2)
            scale *= 2 if "q_proj" in name or "k_proj" in name else 1
            value = ((part >> np.uint64(56)).astype(np.float64) - 128) / 128 * scale
        yield name, torch.from_numpy(value)


def batch(this, step):
    """Sequences of some documents each; about a quarter of the targets does not count."""
    shape = (this["sequences"], this["length"])
    draws = numbers(SEED + step, 4 * math.prod(shape)).reshape(*shape, 4)
    border, tokens, targets, counted = (draws[..., i] for i in range(4))
    vocab = np.uint64(this["shape"]["vocab"])
    position = np.arange(this["length"])
    starts = np.maximum.accumulate(np.where(border % np.uint64(9) == 0, position, 0), axis=1)
    as_tensor = lambda array: torch.from_numpy(array.astype(np.int64))
    counted = torch.from_numpy(counted % np.uint64(4) != 0)
    return as_tensor(tokens % vocab), as_tensor(targets % vocab), counted, as_tensor(starts)


def mask(starts):
    """What attention adds to its scores: a position sees its own document, up to itself. Positions
    count on through a sequence, whatever documents are in it."""
    key = torch.arange(starts.shape[1])
    seen = (key[None, None, :] <= key[None, :, None]) & (key[None, None, :] >= starts[:, :, None])
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)[:, None]


def build(shape):
    config = LlamaConfig(
        hidden_size=shape["dim"], num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"], intermediate_size=shape["hidden"],
        vocab_size=shape["vocab"], max_position_embeddings=shape["context"], rms_norm_eps=EPS,
        rope_parameters=dict(rope_type="default", rope_theta=shape["rope_theta"]),
        tie_word_embeddings=False, use_cache=False, attn_implementation="eager",
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    ours = dict(initial(shape))
    theirs = dict(model.named_parameters())
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            assert parameter.shape == ours[name].shape and parameter.dtype is torch.float64, name
            parameter.copy_(ours[name])
    return model


def learning_rate(step):
    """Linear warm-up, then half a cosine to the final share of the peak at the last step."""
    r = RECIPE
    if step < r["warmup_steps"]:
        return r["learning_rate"] * step / r["warmup_steps"]
    done = (step - r["warmup_steps"]) / (r["steps"] - r["warmup_steps"])
    low = r["final_ratio"] * r["learning_rate"]
    return low + (r["learning_rate"] - low) * (1 + math.cos(math.pi * done)) / 2


def kept(tensor):
    """A tensor as it is, or its sketch."""
    values = tensor.detach().numpy()
    if values.size <= RAW:
        return values.copy()
    signs = 1 - 2 * (numbers(SEED, values.size) >> np.uint64(63)).astype(np.float64)
    return np.bincount(np.arange(values.size) % SKETCH, values.ravel() * signs, SKETCH)


def train(this):
    """Ten steps; what there is to compare, and what each step said."""
    model = build(this["shape"])
    weights = dict(model.named_parameters())
    groups = [
        dict(params=[p for p in weights.values() if p.dim() > 1], weight_decay=RECIPE["weight_decay"]),
        dict(params=[p for p in weights.values() if p.dim() == 1], weight_decay=0.0),
    ]
    betas = (RECIPE["beta1"], RECIPE["beta2"])
    optimiser = torch.optim.AdamW(groups, betas=betas, eps=RECIPE["epsilon"])
    tensors, steps = {}, []
    for step in range(1, RECIPE["steps"] + 1):
        tokens, targets, counted, starts = batch(this, step)
        logits = model(input_ids=tokens, attention_mask=mask(starts)).logits
        loss = F.cross_entropy(logits[counted], targets[counted])
        loss.backward()
        if step == 1:
            tensors["logits"] = kept(logits)
            tensors |= {f"gradient.{name}": kept(p.grad) for name, p in weights.items()}
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), RECIPE["clip_norm"])
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step)
        optimiser.step()
        optimiser.zero_grad()
        steps.append(dict(loss=loss.item(), norm=norm.item()))
        print(f"  step {step}: loss {loss.item():.6f}, norm {norm.item():.4f}, rate {learning_rate(step):.5f}")
    return tensors | {f"after.{name}": kept(p) for name, p in weights.items()}, steps


def main():
    torch.set_default_dtype(torch.float64)
    for name in sys.argv[1:] or CASES:
        this = CASES[name]
        print(name)
        with Wide(), Watch():
            tensors, steps = train(this)
        save_file(tensors, HERE / f"{name}.safetensors")
        made_with = f"torch {torch.__version__}, transformers {transformers.__version__}"
        golden = dict(made_with=made_with, **this, recipe=RECIPE, seed=SEED, raw=RAW, sketch=SKETCH, steps=steps)
        (HERE / f"{name}.json").write_text(json.dumps(golden, indent=1) + "\n")


main()
