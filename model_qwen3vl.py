"""Qwen3-VL (dense) by hand: pictures and chat -> Batch -> residual stream -> logits.

    Qwen3VL            the network; its parameters carry the names of a Hugging Face checkpoint
      VisionModel        patches -> blocks -> merger, and a DeepStack merger for some of the blocks
      TextModel          embeddings -> decoder layers, with an explicit hook on the residual stream -> norm
    generate           one prefill per prompt; its samples are a tree: what they begin with alike is computed once
    CapturedStep       on CUDA a step of it is one graph, of matrix products and of kernels that are written here
    Processor          chat and pictures -> Batch, left-padded
    load, save         Hugging Face layout, safetensors only

    B rows    T tokens in this call    S cache slots     V vocabulary     G samples per prompt
    D residual width    F MLP inner width    H query heads    K key/value heads    d head width
    N patches of a picture    M = N / merge**2 image tokens    E vision width    p patch size

One forward serves training, prefill, decoding and evaluation. Left out: videos, mixture of experts, beam search,
dropout.
"""
import json
import math
import os
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl        # comes with torch where that is built for CUDA
except ImportError:
    triton = None

# ------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower, named as in `vision_config` of config.json."""
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    initializer_range: float = 0.02
    rope_theta: float = 10000.0

    @property
    def head_dim(self):
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the decoder, named as in `text_config` of config.json."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    mrope_section: tuple
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    initializer_range: float = 0.02


@dataclass(frozen=True)
class Qwen3VLConfig:
    """What config.json says of a `qwen3_vl` checkpoint; `raw` and `generation` are the JSON, written back on saving."""
    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tie_word_embeddings: bool
    eos_token_ids: tuple
    pad_token_id: int
    raw: dict = field(repr=False, compare=False)
    generation: dict = field(repr=False, compare=False)

    @classmethod
    def from_dict(cls, raw, generation=None):
        """Read a config.json dict, old style (rope_theta, rope_scaling) or new (rope_parameters).

        generation: generation_config.json's dict, which decides on the end-of-sequence tokens.
        Raises ValueError where the checkpoint is no dense Qwen3-VL or a size is missing or absurd.
        """
        if raw.get("model_type") != "qwen3_vl":
            hint = "mixture-of-experts is not supported" if "moe" in str(raw.get("model_type")) else "not a Qwen3-VL"
            raise ValueError(f"config.json: model_type is {raw.get('model_type')!r} ({hint}); 'qwen3_vl' is needed")
        for name in ("text_config", "vision_config"):
            if not isinstance(raw.get(name), dict):
                raise ValueError(f"config.json: {name} is missing or no object")
        text, vision = dict(raw["text_config"]), dict(raw["vision_config"])
        rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "mrope"):
            raise ValueError(f"config.json: text_config rope_type {kind!r} is not supported; 'default' is")
        text["rope_theta"] = rope.get("rope_theta", text.get("rope_theta", 500000.0))
        text["mrope_section"] = tuple(rope.get("mrope_section", (24, 20, 20)))
        text.setdefault("num_key_value_heads", text.get("num_attention_heads"))
        if "head_dim" not in text:
            text["head_dim"] = text.get("hidden_size", 0) // (text.get("num_attention_heads") or 1)
        vision["deepstack_visual_indexes"] = tuple(vision.get("deepstack_visual_indexes", (8, 16, 24)))
        vision["rope_theta"] = (vision.get("rope_parameters") or {}).get("rope_theta", 10000.0)
        generation = generation or {}
        said = lambda name: next((d[name] for d in (generation, raw, text) if d.get(name) is not None), None)
        eos, pad = said("eos_token_id"), said("pad_token_id")
        eos = tuple(eos) if isinstance(eos, (list, tuple)) else (() if eos is None else (eos,))
        for where, values, act in (("text", text, "silu"), ("vision", vision, "gelu_pytorch_tanh")):
            if values.get("hidden_act", act) != act:
                raise ValueError(f"config.json: {where}_config.hidden_act is {values['hidden_act']!r}; {act!r} is supported")
        cfg = cls(
            text=_build(TextConfig, text, "text_config"), vision=_build(VisionConfig, vision, "vision_config"),
            image_token_id=raw.get("image_token_id", 151655), video_token_id=raw.get("video_token_id", 151656),
            vision_start_token_id=raw.get("vision_start_token_id", 151652),
            vision_end_token_id=raw.get("vision_end_token_id", 151653),
            tie_word_embeddings=raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
            eos_token_ids=eos, pad_token_id=pad if pad is not None else (eos[0] if eos else 0),
            raw=raw, generation=generation)
        cfg.check()
        return cfg

    def check(self):
        """The sizes fit each other. Raises ValueError."""
        text, vision = self.text, self.vision
        sections, deep, places = text.mrope_section, vision.deepstack_visual_indexes, vision.num_position_embeddings
        ids = *self.never_sampled, *self.eos_token_ids, self.pad_token_id
        for fits, wanted in (
                (max(text.num_hidden_layers, vision.depth) <= 500, "at most 500 layers are supported"),
                (text.num_attention_heads % text.num_key_value_heads == 0,
                 "num_key_value_heads must divide num_attention_heads"),
                (vision.out_hidden_size == text.hidden_size,
                 f"vision out_hidden_size {vision.out_hidden_size} must equal text hidden_size {text.hidden_size}"),
                (len(sections) == 3 and 2 * sum(sections) == text.head_dim,
                 f"mrope_section {list(sections)} must be three that add up to half of head_dim {text.head_dim}"),
                (vision.hidden_size % (4 * vision.num_heads) == 0, "4 num_heads must divide the vision hidden_size"),
                (vision.in_channels == 3, "in_channels must be 3"),
                (math.isqrt(places)**2 == places, "num_position_embeddings must be a square"),
                (len({*deep}) == len(deep) and max(deep, default=0) < vision.depth,
                 f"deepstack_visual_indexes {list(deep)} must be different blocks below depth {vision.depth}"),
                (type(self.tie_word_embeddings) is bool, "tie_word_embeddings must be true or false"),
                (all(type(i) is int and 0 <= i < text.vocab_size for i in ids),
                 f"or generation_config.json: token ids {[*ids]} must be whole numbers below vocab_size")):
            if not fits:
                raise ValueError(f"config.json: {wanted}")

    @property
    def never_sampled(self):
        """Vision tokens: sampled, they would announce a picture that is not there."""
        return [self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id]


def _build(cls, values, where):
    """A config dataclass from a JSON dict; a missing or absurd size names itself."""
    known = {f.name: f for f in fields(cls)}
    chosen = {name: values[name] for name in known if name in values}
    for name, f in known.items():
        value = chosen.get(name, f.default)
        whole = lambda value: type(value) is int and 0 <= value < 2**31             # true is an int, but no number
        fits, wanted = {
            int: (whole(value) and value > 0, "a positive whole number"),
            float: (type(value) in (int, float) and 0 < value < math.inf, "a positive number"),
            bool: (type(value) is bool, "true or false"),
            tuple: (type(value) is tuple and all(map(whole, value)), "a list of whole numbers"),
        }[f.type]
        if not fits:
            found = f"is {chosen[name]!r}" if name in chosen else "is missing"
            raise ValueError(f"config.json: {where}.{name} {found}; {wanted} is needed")
    return cls(**chosen)


# ------------------------------------------------------------------------------ the network


@dataclass
class Batch:
    """Rows of tokens, left-padded, with their pictures.

    A row may hold a tree: several continuations of one prompt, which share it and what they begin with alike. `segments`
    tells which of them run through a token, as bits; a token sees those before it with which it shares one.
    """
    input_ids: torch.Tensor                    # (B, T)
    attention_mask: torch.Tensor = None        # (B, T) 1 for real tokens; None: all real
    pixel_values: torch.Tensor = None          # (sum of N, 3 * temporal * p * p) patches, in row order
    image_grid_thw: torch.Tensor = None        # (pictures, 3) patches per picture: 1, rows, columns
    image_features: list = None       # per picture (1 + DeepStack, M, D): what encode_images made of it
    pictures: torch.Tensor = None              # (pictures,) equal numbers where these are equal; None: no two are
    position_ids: torch.Tensor = None    # (3, B, T) time, height, width; None: computed from the tokens
    segments: torch.Tensor = None              # (B, T) sets of continuations, PROMPT or PADDING; None: prompts alone
    apart: torch.Tensor = None                 # (B,) packed, rows of unequal numbers share nothing; None: all may share
    packing: "Packing" = None                  # None: the rows as they are, padding and all

    def to(self, device):
        return replace(self, **{f.name: sent(getattr(self, f.name), device) for f in fields(self)})


def sent(value, device):
    """A tensor, a list of tensors or a Packing on that device. The CPU does not wait until a GPU has got to it."""
    if isinstance(value, list):
        return [sent(v, device) for v in value]
    if isinstance(value, Packing):
        return Packing(*(sent(getattr(value, f.name), device) for f in fields(value)))
    if value is None or value.device == torch.device(device):
        return value
    if value.device.type == "cpu" and torch.device(device).type == "cuda":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


PADDING = 2**62
PROMPT = PADDING - 1                           # all 62 continuations that there can be


@dataclass
class Packing:
    """N tokens lie in one row, so that nothing is computed for padding, and attend prompt by prompt; `segments` is (B, W).

    What several prompts begin with alike, a picture say, is there once: all but attention is computed once for them.
    """
    spread: torch.Tensor                       # (B, W) place in the row of each prompt's tokens; any where there are fewer
    pack: torch.Tensor                         # (1, N) place of each token in (B * W), one of those that share it
    again: torch.Tensor = None                 # (A,) the other places of those that are shared
    wanted: torch.Tensor = None                # (M,) places in the row whose hidden states are asked for; None: all
    queries: "Packing" = None                  # of these M alone, in (B, C): the columns from the first of them on

    @classmethod
    def of(cls, real, lead=None):
        """real: (B, W) bool, which slots hold a token; lead: (B, W) the slot in (B * W) that stands for each; None: itself."""
        own = torch.arange(real.numel(), device=real.device).view_as(real)
        lead = own if lead is None else lead
        first = real & (lead == own)                                        # (B, W)
        number = first.flatten().cumsum(0) - 1                              # (B * W,)
        return cls(number[lead].clamp_min(0), first.flatten().nonzero().T, (real & ~first).flatten().nonzero()[:, 0])

    @property
    def padded(self):
        return self.pack.numel() < self.spread.numel()

    def rows(self, x):
        """(1, N, ...) -> (B, W, ...), padding and all; without any both are the same."""
        return move(x, self.spread, self.pack, self.again) if self.padded else x.view(*self.spread.shape, *x.shape[2:])

    def row(self, x):
        """(B, W, ...) -> (1, N, ...)."""
        return move(x, self.pack, self.spread, self.again) if self.padded else x.view(1, -1, *x.shape[2:])


def move(x, there, back, again):
    """`at(x, there)`; back: the place in `there` of each place of x; again: see Packing."""
    return Moved.apply(x, there, back, again) if x.requires_grad else at(x, there)


class Moved(torch.autograd.Function):
    """(B, T, ...) -> (*there, ...) as `at` does it, and the gradient back likewise: only what is shared is added up.

    What a slot of padding gets for its gradient is another's, and reaches nothing: padding is seen by padding alone.
    """

    @staticmethod
    def forward(ctx, x, there, back, again):
        ctx.save_for_backward(there, back, again)
        return at(x, there)

    @staticmethod
    def backward(ctx, gradient):
        there, back, again = ctx.saved_tensors
        moved = at(gradient, back)
        if len(again) and len(there) > 1:               # from one row to many: they all had the token from there
            moved[0].index_add_(0, there.flatten()[again], gradient.flatten(0, 1)[again])
        elif len(again):                                # only the first went there
            moved.flatten(0, 1).index_fill_(0, again, 0)
        return moved, None, None, None


def no_hook(value, site, layer):
    """The default hook: look at nothing, change nothing."""
    return value


@contextmanager
def any_kernel():
    """Within, torch may take kernels for which it does not vouch that they add in the same order each time."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


class Qwen3VL(nn.Module):
    """Qwen3-VL with random weights; `from_pretrained` reads a checkpoint."""

    captured = True         # on CUDA, decode by a captured graph (CapturedStep); False: the plain way, the same tokens

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = nn.ModuleDict({"visual": VisionModel(cfg.vision), "language_model": TextModel(cfg.text)})
        self.lm_head = nn.Linear(cfg.text.hidden_size, cfg.text.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv3d)) and not module.weight.is_meta:
                nn.init.normal_(module.weight, std=cfg.text.initializer_range)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        self.tie_weights()

    def tie_weights(self):
        if self.cfg.tie_word_embeddings:
            self.lm_head.weight = self.text.embed_tokens.weight

    @property
    def text(self):
        return self.model["language_model"]

    @property
    def device(self):
        return self.lm_head.weight.device

    def forward(self, batch, hook=no_hook, cache=None, start=None, stop=None):
        """Tokens and pictures -> hidden states after the last norm, (B, T, D); of a packed batch (1, N, D) or (1, M, D).

        hook(value, site, layer) -> value is called at two sites of every decoder layer, and what it returns goes
        on: "mlp_inner" (B, T, F), which down_proj multiplies, and "resid" (B, T, D), the residual stream as the
        next layer reads it. cache: a Cache to read earlier tokens from and append these to. start: (n, x), the layers from
        n on alone, of which the first reads x; stop: those before it alone, for what the hooks see. Where only some hidden
        states are wanted, the last layer makes keys and values alone of the others, and its hooks do not see them.
        Raises ValueError where image tokens and pictures do not match.
        """
        ids, given, batch = batch.input_ids, batch.position_ids is not None, self.located(batch)        # (B, T)
        x = self.text.embed_tokens(ids)                                     # (B, T, D)
        slots, features = None, self._image_features(batch)
        if features is not None:
            is_image, M = ids == self.cfg.image_token_id, features.shape[1]
            if not given and int(is_image.sum()) != M:    # else it was seen when they were made
                raise ValueError(f"the text has {int(is_image.sum())} image tokens, the pictures give {M}")
            slots = torch.nonzero_static(is_image, size=M).unbind(1)        # two of (M,); that M is known spares a wait
            x = x.index_put(slots, features[0].to(x.dtype))
        first, x = start or (0, x)
        return self.text(x, batch.position_ids, batch.segments, batch.packing, slots, features, cache, hook, first, stop)

    def located(self, batch):
        """The Batch with segments and positions, those of prompts alone where it has none."""
        ids, segments, positions = batch.input_ids, batch.segments, batch.position_ids
        if segments is None:
            segments = PADDING - (torch.ones_like(ids) if batch.attention_mask is None else batch.attention_mask.long())    # (B, T)
        if positions is None:
            positions = mrope_positions(ids, segments != PADDING, batch.image_grid_thw, self.cfg)       # (3, B, T)
        return replace(batch, segments=segments, position_ids=positions)

    def _image_features(self, batch):
        """(1 + DeepStack, tokens of all pictures, D), or None for text alone."""
        if batch.image_features is not None:
            return torch.cat(batch.image_features, dim=1) if batch.image_features else None
        if batch.pixel_values is None or len(batch.pixel_values) == 0:
            return None
        return torch.cat(self.encode_images(batch.pixel_values, batch.image_grid_thw), dim=1)

    def encode_images(self, pixel_values, image_grid_thw):
        """Pictures -> per picture (1 + DeepStack, M, D): its embedding and what DeepStack adds to early layers.

        Worth keeping while the vision tower is frozen: put the list into Batch.image_features.
        """
        return self.model["visual"](pixel_values, image_grid_thw)

    def logits(self, hidden):
        """(..., D) -> (..., V). A call of its own, so that nobody makes (B, T, V) by accident."""
        return self.lm_head(hidden)

    def allowed_logits(self, hidden):
        """As `logits`, with -inf for vision tokens."""
        ban = hidden.new_zeros(self.cfg.text.vocab_size)                    # a bias: the product adds it at no cost
        for token in self.cfg.never_sampled:
            ban[token].fill_(-torch.inf)                                    # ban[token] = -inf would be sent, and waited for
        return F.linear(hidden, self.lm_head.weight, ban)

    def packed(self, batch, wanted):
        """The Batch with each token once: no padding, and what prompts begin with alike is there for all of them.

        wanted: (B, W) bool, whose hidden states are asked for.
        """
        batch, device = self.located(batch), wanted.device
        ids, segments, grids, features = batch.input_ids, batch.segments, batch.image_grid_thw, batch.image_features
        B, real = len(ids), segments != PADDING                             # (B, W)
        # What makes two tokens alike: of pictures it is which, and what follows a prompt is like no other row's.
        path = torch.where(segments == PROMPT, ids, -1 - torch.arange(B, device=device)[:, None])       # (B, W)
        if grids is not None:
            image = real & (ids == self.cfg.image_token_id)
            number = torch.arange(len(grids)) if batch.pictures is None else batch.pictures
            size = sent(grids, device).prod(1) // self.cfg.vision.spatial_merge_size**2     # (pictures,) tokens of each
            path[image] = -1 - B - sent(number, device).repeat_interleave(size)
        if batch.apart is not None:
            path += batch.apart[:, None] * 2**32
        packing = Packing.of(real, prefixes(path, real.long().argmax(1)))
        if packing.pack.numel() == wanted.sum():        # by their number a hook tells all tokens from those asked for
            packing = Packing.of(real)
        slot = packing.pack                                                 # (1, N)
        if batch.pictures is not None:
            there = torch.zeros_like(real).flatten().index_fill(0, slot[0], True).view_as(real)
            features = [f for f, kept in zip(features, there[image][size.cumsum(0) - size].tolist()) if kept]
        packing.wanted = packing.spread[wanted]                             # (M,)
        packing.queries = Packing.of(wanted[:, int(wanted.any(0).long().argmax()):])        # (B, C)
        return replace(batch, input_ids=ids.flatten()[slot], position_ids=batch.position_ids.flatten(1)[:, slot],
                       image_features=features, packing=packing)

    def continuations(self, batch, tokens, keep):
        """Hidden states that predict the kept tokens of G continuations per prompt: (kept, D), in keep's order.

        tokens: (B, G, C) continuations of each row of the batch; keep: (B, G, C) bool, true from the first token
        up to some last one. A prompt is computed once and so is what some continuations begin with alike: the work of a
        group is P tokens and those of its tree, not G * (P + C).
        """
        tree, place = self.tree(batch, tokens, keep)
        return self(tree)[0, sent(place[keep], self.device)]

    def tree(self, batch, tokens, keep):
        """The Batch that `continuations` computes and where, in what it gives, a kept token is predicted: (B, G, C).

        What is given may lie on the CPU, so that a GPU goes on with its work meanwhile; the Batch is on the model's device.
        """
        B, G, C = tokens.shape
        P, batch = batch.input_ids.shape[1], self.located(batch)
        positions = batch.position_ids                                      # (3, B, P)
        fed = keep[..., 1:]                             # (B, G, C - 1) a last token predicts nothing
        leader, node, through = tree_of(tokens[..., :-1], fed)              # (B, G, C - 1) each
        order = (~node).flatten(1).long().argsort(dim=1, stable=True)       # (B, G * (C - 1)) nodes first
        order = order[:, :int(node.sum((1, 2)).max())]                      # (B, W)
        ids, inside, through = (x.flatten(1).gather(1, order) for x in (tokens[..., :-1], node, through))
        place = positions.amax((0, 2))[:, None] + 1 + order % max(C - 1, 1)                                 # (B, W)
        segments = torch.cat([batch.segments, through.masked_fill(~inside, PADDING)], 1)                    # (B, P + W)
        wanted = torch.cat([torch.zeros_like(batch.input_ids, dtype=torch.bool), inside], 1)
        wanted[:, P - 1] = True
        # The first token is predicted by the end of the prompt, token c by the column that token c - 1 went to.
        column = node.flatten(1).cumsum(1).view_as(node).gather(1, leader)  # (B, G, C - 1) where a fed token lies
        source = torch.cat([torch.zeros_like(tokens[..., :1]), column], 2)  # (B, G, C)
        number = (wanted.flatten().cumsum(0) - 1).view_as(wanted)[:, P - 1:]            # (B, 1 + W) place among the wanted
        tree = self.packed(replace(batch, input_ids=torch.cat([batch.input_ids, ids], 1), segments=segments,
                                   position_ids=torch.cat([positions, place.expand(3, -1, -1)], 2)), wanted)
        return tree.to(self.device), number.gather(1, source.flatten(1)).view_as(source)

    def distribution(self, hidden, temperature=1.0, top_p=1.0, support=None, include=None):
        """Log-probabilities of the next token exactly as `generate` samples it: (n, D) -> (n, V) float32.

        Vision tokens are out. top_p keeps the smallest set of tokens whose probability reaches it, and `include` (n,)
        besides; `support` (n, V) bool takes that set from another policy instead. Outside the set: -inf.
        """
        # By a float32 tensor, which makes bfloat16 logits float32 on the way: they lose digits of the softmax.
        logits = self.allowed_logits(hidden) / torch.full((1,), temperature, device=hidden.device)
        if support is None and top_p < 1.0:
            with torch.no_grad():
                p = logits.softmax(-1)
                support = p >= nucleus_threshold(p, top_p)
                if include is not None:
                    support.scatter_(-1, include[:, None], True)
        if support is not None:
            logits = logits.masked_fill(~support, -torch.inf)
        return logits.log_softmax(-1)

    @torch.no_grad()
    @any_kernel()       # without a backward each adds in one order; what is written twice is alike, or whole numbers added up
    def generate(self, batch, max_new_tokens=50, num_samples=1, temperature=0.0, top_p=1.0, generator=None, chance=None,
                 logp=None):
        """Continue every row: (B * num_samples, n) new tokens, n <= max_new_tokens, padded after the end token.

        Samples of row b are rows b * num_samples onwards. temperature 0 is greedy; else tokens are drawn from
        `distribution(temperature, top_p)` with the given torch.Generator. Vision tokens are never produced.
        chance: (B, num_samples, max_new_tokens) float64 in [0, 1), the random numbers instead, one per token: what a row
        says then does not hang on what else is in its batch. logp: (B, num_samples, max_new_tokens), to be filled with the
        log-probabilities in nats of what is drawn.
        """
        if max_new_tokens < 1 or not 1 <= num_samples <= 62:
            raise ValueError(f"max_new_tokens {max_new_tokens}, num_samples {num_samples}: at least 1 is needed, of "
                             "samples at most 62")
        cfg, device, G = self.cfg, self.device, num_samples
        B, P = batch.input_ids.shape
        eos = torch.tensor(cfg.eos_token_ids, device=device)

        # 1 Prefill: every prompt once, whatever the number of its samples.
        captured, graph = self.captured and device.type == "cuda" and kernels_work(device), None
        spare = 0 if captured or G == 1 or B < MANY else B // 2             # rows that samples will part into
        cache = Cache(cfg.text, B, self.lm_head.weight.dtype, device, spare)
        cache.make_room(P + (G * (max_new_tokens - 1) if captured else ROOM))       # a captured step cannot grow
        batch = self.located(batch)
        last = (torch.arange(P, device=device) == P - 1).expand(B, P)       # of left-padded rows it is a token
        hidden = self(self.packed(batch, last), cache=cache)                # (1, B, D)
        position = batch.position_ids.amax((0, 2)) + 1                      # (B,)
        row = prompt = torch.arange(B, device=device)           # of each of N nodes: its row of the cache, its prompt
        node = prompt[:, None].expand(B, G)                     # where each sample stands

        if temperature > 0 and chance is None:
            chance = torch.rand(B, G, max_new_tokens, dtype=torch.float64, generator=generator, device=device)
        tokens = torch.full((B, G, max_new_tokens), cfg.pad_token_id, device=device)
        done, length = torch.zeros(B, G, dtype=torch.bool, device=device), torch.zeros((), dtype=torch.long, device=device)
        for n in range(max_new_tokens):
            # 2 Every sample draws its own next token; a finished one is padded.
            point = None if chance is None else chance[prompt, :, n]        # (N, G)
            drawn, said = self._next_token(hidden.flatten(0, 1), temperature, top_p, point)     # (N, G), of every node
            token = drawn.expand(-1, G).gather(0, node).masked_fill(done, cfg.pad_token_id)                 # (B, G)
            tokens[:, :, n] = token
            if logp is not None:
                logp[:, :, n] = said.gather(0, node)
            length += (~done).any()
            done = done | torch.isin(token, eos)
            if n + 1 == max_new_tokens:
                break
            # 3 Samples that have said the same are one node of the next step, finished ones none. A captured step's shapes
            #   are fixed: there each sample is a node of its own, and finished ones stay until they are half of all. How many
            #   go on is asked each fourth step and heard one later: else the GPU would wait for the CPU meanwhile.
            if n % 4 == 2 and graph:
                alive = later((~done).sum())
            if graph is None or n % 4 == 3 and alive() <= len(row) / 2:
                if done.all():
                    break
                graph, at_row = None, row[node]                             # (B, G)
                path = at_row * G + torch.arange(G, device=device) if captured else node * cfg.text.vocab_size + token
                node, speaker = branch(path, ~done)
                order, row, column = cache.arrange(at_row.flatten()[speaker], G if captured or B < MANY else None)  # (N,) each
                node, speaker = order.argsort()[node], speaker[order]
                prompt = speaker // G                                       # (N,)
                segments, packing = laid_out(row, column, node, ~done)
            ids = token.flatten()[speaker]                                  # (N,)
            shape = (1, -1) if packing else (len(segments), -1)             # packed; as it is where nothing is to pack
            batch = Batch(ids.view(shape), position_ids=(position[prompt] + n).view(shape).expand(3, -1, -1),
                          segments=segments, packing=packing)
            graph = graph or (CapturedStep(self, cache, batch, max_new_tokens - n - 1) if captured else None)
            hidden = graph(batch) if graph else self(batch, cache=cache)    # (1, N, D) or (R, W, D)
        return tokens[:, :, :int(length)].flatten(0, 1)

    def _next_token(self, hidden, temperature, top_p, point):
        """(N, D), numbers in [0, 1) (N, G) -> token ids and their log-probabilities, (N, G); greedy (N, 1) and None."""
        if temperature == 0.0:
            return self.allowed_logits(hidden).argmax(-1, keepdim=True), None
        # Where a uniform number falls among the sums of p: one random number a row, not one per token of the vocabulary.
        if self.captured and hidden.is_cuda and top_p == 1.0 and kernels_work(hidden.device):
            return drawn_from(self.allowed_logits(hidden), temperature, point)
        logp = self.distribution(hidden, temperature, top_p)                                            # (N, V)
        drawn, _ = pick(*blocks_of(logp.exp()), point)
        return drawn, logp.gather(1, drawn)

    @classmethod
    def from_pretrained(cls, path_or_hub_name, dtype=None, device=None, offline=False):
        """Load a Hugging Face checkpoint, one file or shards, strictly: every tensor is wanted, fits and is finite.

        device None: CUDA where there is one. dtype None: the checkpoint's own on CUDA, float32 on a CPU.
        offline: a hub name must have been downloaded before. One tensor at a time is read: there is no second copy.
        Raises ValueError (what is wrong in which file) or FileNotFoundError.
        """
        folder = checkpoint_folder(path_or_hub_name, offline)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        generation = folder / "generation_config.json"
        raw, said = read_json(folder / "config.json"), read_json(generation) if generation.exists() else None
        try:
            cfg = Qwen3VLConfig.from_dict(raw, said)
            with torch.device("meta"):
                model = cls(cfg)
        except ValueError as error:
            raise ValueError(f"{folder}/{error}") from None
        except (KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:  # last: sizes overflow
            raise ValueError(f"{folder / 'config.json'}: not a Qwen3-VL configuration ({first_line(error)})") from None
        wanted = {name: value.shape for name, value in model.state_dict().items()}
        if cfg.tie_word_embeddings:
            del wanted["lm_head.weight"]
        state = {}
        for file in weight_files(folder):
            try:
                with safe_open(file, framework="pt", device=str(device)) as opened:
                    for name in opened.keys():
                        if cfg.tie_word_embeddings and name == "lm_head.weight":
                            continue
                        check_tensor(file, name, tuple(opened.get_slice(name).get_shape()), wanted)
                        value = opened.get_tensor(name)
                        state[name] = value.to(dtype or (torch.float32 if device.type == "cpu" else value.dtype))
                        check_finite(file, name, state[name])
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file}: not a whole safetensors file ({first_line(error)})") from None
        if missing := wanted.keys() - state.keys():
            raise ValueError(f"{folder}: {len(missing)} tensors are missing, {min(missing)} among them")
        if cfg.tie_word_embeddings:
            state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
        model.load_state_dict(state, strict=True, assign=True)
        model.tie_weights()
        return model.requires_grad_(True).eval()

    def save_pretrained(self, directory):
        """Write config.json, generation_config.json and model.safetensors, each aside and renamed into place."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        if self.cfg.tie_word_embeddings:
            del state["lm_head.weight"]  # the same tensor as the embedding; transformers leaves it out too
        with aside(directory / "model.safetensors") as part:
            save_file(state, part, metadata={"format": "pt"})
        dtype = str(self.lm_head.weight.dtype).removeprefix("torch.")
        write_aside(directory / "config.json", json.dumps({**self.cfg.raw, "dtype": dtype}, indent=2).encode())
        ends = {**self.cfg.generation, "eos_token_id": list(self.cfg.eos_token_ids), "pad_token_id": self.cfg.pad_token_id}
        write_aside(directory / "generation_config.json", json.dumps(ends, indent=2).encode())


# ------------------------------------------------------------------------------ decoder


class TextModel(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(cfg, i) for i in range(cfg.num_hidden_layers)])
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.recompute = False      # activation checkpointing: backward makes each layer's activations again

    def forward(self, x, positions, segments, packing, slots, features, cache, hook, first, stop):
        rope = mrope_cos_sin(positions, self.cfg, x.dtype)                  # two of (B, T, 1, d)
        if cache is not None:
            cache.make_room(segments.shape[1])
        mask = visible(segments, cache, self.cfg.num_attention_heads // self.cfg.num_key_value_heads, x.dtype)
        deep = 0 if features is None else len(features) - 1
        wanted, stop = None if packing is None else packing.wanted, stop or len(self.layers)
        for i, layer in list(enumerate(self.layers))[first:stop]:
            again = self.recompute and torch.is_grad_enabled()
            left = wanted if i + 1 == stop > deep else None
            run = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False) if again else layer
            x = run(x, rope, mask, packing, left, cache, hook)              # (B, T, D)
            if i < deep:                                   # DeepStack: detail enters after early layers
                x = x.index_put(slots, features[i + 1].to(x.dtype), accumulate=True)
            x = hook(x, "resid", i)                        # the residual stream as layer i + 1 reads it
        if cache is not None:
            cache.end += segments.shape[1]
        return self.norm(x if wanted is None or left is not None else x[:, wanted])


class DecoderLayer(nn.Module):
    def __init__(self, cfg, index):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg, index)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg, index)

    def forward(self, x, rope, mask, packing, wanted, cache, hook):
        seen = self.self_attn(self.input_layernorm(x), rope, mask, packing, wanted, cache)
        x = seen.add_(x if wanted is None else x[:, wanted])                # in place: on a CPU it is memory that is waited for
        return self.mlp(self.post_attention_layernorm(x), hook).add_(x)


class Attention(nn.Module):
    """Grouped-query attention; queries and keys are normalised per head before they are rotated."""

    def __init__(self, cfg, index):
        super().__init__()
        self.index, self.head_dim = index, cfg.head_dim
        D, d, bias = cfg.hidden_size, cfg.head_dim, cfg.attention_bias
        self.q_proj = nn.Linear(D, cfg.num_attention_heads * d, bias=bias)
        self.k_proj = nn.Linear(D, cfg.num_key_value_heads * d, bias=bias)
        self.v_proj = nn.Linear(D, cfg.num_key_value_heads * d, bias=bias)
        self.o_proj = nn.Linear(cfg.num_attention_heads * d, D, bias=bias)
        self.q_norm = RMSNorm(d, cfg.rms_norm_eps)
        self.k_norm = RMSNorm(d, cfg.rms_norm_eps)

    def forward(self, x, rope, mask, packing, wanted, cache):
        heads = lambda x: x.unflatten(-1, (-1, self.head_dim))
        k = rotate(self.k_norm(heads(self.k_proj(x))), rope)                # (B, T, K, d)
        v = heads(self.v_proj(x))                                           # (B, T, K, d)
        if packing is not None:
            k, v = packing.rows(k), packing.rows(v)                         # (B, W, K, d)
        if wanted is not None:      # queries of these alone
            packing, x, rope = packing.queries, x[:, wanted], [part[:, wanted] for part in rope]
            mask = mask.unflatten(2, (-1, k.shape[1]))[..., -packing.spread.shape[1]:, :].flatten(2, 3)     # (B, 1, H / K * C, S)
        q = rotate(self.q_norm(heads(self.q_proj(x))), rope)                # (B, T, H, d)
        if packing is not None:
            q = packing.rows(q)                                             # (B, W or C, H, d)
        if cache is not None:
            k, v = cache.write(self.index, k, v)                            # (B, S, K, d)
        out = attend(q, k, v, mask)                                         # (B, T, H * d)
        if packing is not None:
            out = packing.row(out)                                          # (1, N or M, H * d)
        return self.o_proj(out)


def attend(q, k, v, mask=None):
    """Softmax attention. q: (B, T, H, d), k and v: (B, S, K, d), mask: see `visible` -> (B, T, H * d)."""
    B, T, H, d = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                        # (B, H, T, d), (B, K, S, d)
    K = k.shape[1]
    if q.is_cuda and torch.is_grad_enabled():
        # The kernel whose backward adds in the same order each time works head by head: with H it is quick, with K it is not.
        k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))             # (B, H, S, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, :, :T])
        return out.transpose(1, 2).reshape(B, T, H * d)
    # The H / K query heads of a key head are more queries of that head: no copy of keys, any kernel will do.
    q = q.reshape(B, K, -1, d)                                              # (B, K, H / K * T, d)
    if q.is_cuda or k[0, 0].numel() > 2**14:
        with any_kernel():          # without a backward each adds in one order
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:               # few keys on a CPU: its kernels are slower than these four operations, or are a dozen small ones
        scores = (q * d**-0.5) @ k.transpose(2, 3)                          # (B, K, H / K * T, S)
        out = (scores if mask is None else scores.add_(mask)).softmax(-1) @ v
    return out.reshape(B, H, T, d).transpose(1, 2).reshape(B, T, H * d)


def at(x, places):
    """x: (B, T, ...), places: any shape, of places in (B * T) -> (*places, ...)."""
    return F.embedding(places, x.flatten(0, 1).flatten(1)).view(*places.shape, *x.shape[2:])      # its backward is the quickest


class MLP(nn.Module):
    def __init__(self, cfg, index):
        super().__init__()
        self.index = index
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x, hook):
        gate, up = self.gate_proj(x), self.up_proj(x)                       # (B, T, F) each
        # Where no backward wants gate and silu(gate), inner takes gate's place.
        inner = F.silu(gate) * up if torch.is_grad_enabled() else F.silu(gate, inplace=True).mul_(up)       # (B, T, F)
        inner = hook(inner, "mlp_inner", self.index)           # what stage 1's edited matrix multiplies
        return self.down_proj(inner)                                        # (B, T, D)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def embedding(number, width):
    """An nn.Embedding without weights of its own: to draw them on the meta device torch imports a compiler, in 2 s."""
    return nn.Embedding.from_pretrained(torch.empty(number, width), freeze=False)


def tree_of(tokens, keep):
    """Continuations as a tree: what some of them begin with alike is one branch, and its nodes are those of the first.

    tokens, keep: (B, G, C), keep true up to some last token. Returns, each (B, G, C): the first sample that says this token
    and all before it alike; whether that is the sample itself; all that do, as bits (see Batch).
    """
    alike = (tokens[:, :, None] == tokens[:, None]) & keep[:, :, None] & keep[:, None]
    alike = alike.long().cumprod(-1)                                        # (B, G, G, C) 1 or 0
    sample = torch.arange(tokens.shape[1], device=tokens.device)
    leader = alike.argmax(2)                                                # (B, G, C) the first of those that are 1
    return leader, keep & (leader == sample[:, None]), (alike * 2**sample[:, None]).sum(2)


def prefixes(path, start):
    """What rows begin with alike: path (B, W), of which row b begins at column start[b], (B,) -> (B, W), the slot in (B * W)
    that stands for each: one for all rows in which it and what comes before it are equal. Before a start any.
    """
    (B, W), device = path.shape, path.device
    row, column = torch.arange(B, device=device), torch.arange(W, device=device)
    there = start[:, None] + column                                         # (B, W) rows are moved to the left
    path = torch.where(there < W, path.gather(1, there.clamp_max(W - 1)), -1 - row[:, None])            # behind them is like no other
    order = path.unique(dim=0, return_inverse=True)[1].argsort(stable=True)             # (B,) what is alike lies together
    path = path[order]
    new = torch.cat([torch.ones_like(path[:1]), (path[1:] != path[:-1]).long().cumsum(1)]) > 0          # not as in the row above
    leader = order[(new * row[:, None]).cummax(0).values]                   # (B, W) the last row in which it was new
    slot = (leader * W + start[leader] + column)[order.argsort()]
    return slot.gather(1, (column - start[:, None]).clamp_min(0))


def branch(path, member):
    """The nodes of a decoding step: samples on equal paths are one.

    path: (B, G), never the same in two prompts; member: (B, G) bool, who goes on. Returns the node of each sample (B, G) and,
    for each of N nodes, in the order of their paths, a sample that runs through it, as its place in (B * G) (N,).
    """
    found, inverse = path[member].unique(return_inverse=True)               # (N,), (members,)
    place = member.flatten().nonzero()[:, 0]                                # (members,)
    return torch.zeros_like(path).masked_scatter(member, inverse), torch.empty_like(found).index_put((inverse,), place)


def laid_out(row, column, node, member):
    """Nodes in their rows and columns, (N,) each, in that order -> the segments (R, W) of those who run through them, see
    `branch`, and their Packing, None where there are R * W."""
    R, W, N = int(row[-1]) + 1, int(column.max()) + 1, len(row)
    through = node[member]                                                  # (members,)
    sample = member.nonzero()[:, 1]
    segments = torch.zeros(R, W, dtype=torch.long, device=row.device)
    segments = segments.index_put((row[through], column[through]), 2**sample, accumulate=True)          # (R, W)
    spread = torch.zeros_like(segments).index_put((row, column), torch.arange(N, device=row.device))
    packing = None if N == R * W else Packing(spread, (row * W + column)[None])
    return segments.masked_fill(segments == 0, PADDING), packing


def nucleus_threshold(p, top_p, k=64):
    """The probability of the last token of the nucleus, the smallest set that reaches top_p: (n, V) -> (n, 1).

    Only the likeliest k are sorted, and more where they do not reach top_p: sorting a vocabulary costs more than the
    decoding step around it.
    """
    top = p.topk(min(k, p.shape[-1])).values                                # (n, k) falling
    before = running_sum(top) - top                                         # mass of the likelier ones
    if k < p.shape[-1] and bool((before[:, -1] < top_p).any()):
        return nucleus_threshold(p, top_p, 8 * k)
    return top.gather(1, (before < top_p).sum(-1, keepdim=True) - 1)


def pick(sums, within, point):
    """Where numbers in [0, 1) fall among the sums of p, which need not add up to 1: (N, G) and their whole, (N, 1) float64.

    First among the sums of blocks, then within one: the running sum of a whole vocabulary takes longer than a layer.
    sums: (N, V / b); within: blocks (N, G) -> their p, (N, G, b); point: (N, G) float64.
    """
    mass = running_sum(sums, dtype=torch.float64)                           # (N, V / b)
    aim = point * mass[:, -1:]                                              # (N, G)
    block = torch.searchsorted(mass, aim, right=True)                       # never one of p 0: there the sum is flat
    inner = running_sum(within(block), dtype=torch.float64)                 # (N, G, b)
    before = mass.gather(1, block) - inner[..., -1]
    rest = torch.minimum(aim - before, inner[..., -1].nextafter(torch.zeros_like(aim))).clamp_min(0)    # both are rounded
    return block * inner.shape[2] + torch.searchsorted(inner, rest[..., None], right=True)[..., 0], mass[:, -1:]


def blocks_of(p):
    """(N, V) -> what `pick` wants of it."""
    blocks = p.view(len(p), -1, math.gcd(p.shape[1], 32))                   # (N, V / b, b)
    return blocks.sum(-1, dtype=torch.float64), lambda block: blocks.gather(1, block[..., None].expand(-1, -1, blocks.shape[2]))


def running_sum(x, **kind):
    """Along the last dimension. On CUDA torch does not vouch for its order, which a row of its own has."""
    with any_kernel():
        return x.cumsum(-1, **kind)


def visible(segments, cache, repeat, dtype):
    """What is added to attention's scores: 0 where a token sees a slot, -inf elsewhere; made once for all layers.

    segments: (B, T), see Batch -> (B, 1, H / K * T, S); a token sees itself and what came before it on its own paths.
    """
    T = segments.shape[1]
    past = 0
    seen = segments
    if cache is not None:
        past = cache.end
        cache.segments[:cache.rows, past:past + T] = segments
        seen = cache.segments[:cache.rows, :past + T]                               # (B, S)
    mine = (seen[:, None, :] & segments[:, :, None]) != 0                   # (B, T, S)
    slot = torch.arange(past + T, device=segments.device)
    sees = mine & (slot[None, :] <= slot[past:, None])
    mask = torch.full(sees.shape, -torch.inf, dtype=dtype, device=sees.device).masked_fill_(sees, 0.0)
    return mask[:, None].repeat(1, 1, repeat, 1)


# ------------------------------------------------------------------------------ positions


def mrope_positions(ids, real, image_grid_thw, cfg):
    """Multimodal positions (time, height, width) of every token: (3, B, T).

    Text counts on by one, the same on all three axes. A picture of h x w merged tokens that begins at position s:
        time    s s s s ...       height  s .. s s+1 .. s+1 ...       width   s s+1 .. s+w-1 s s+1 ...
    and the text after it goes on at s + max(h, w). Padding stands at 0. real: (B, T) bool.
    """
    is_image = (ids == cfg.image_token_id) & real                           # (B, T)
    step = (real & ~is_image).long()                                # (B, T) how far each token moves on
    offset = torch.zeros(3, *ids.shape, dtype=torch.long, device=ids.device)
    grids = [] if image_grid_thw is None else image_grid_thw.tolist()
    if grids or is_image.any():
        first, back, places = [], [], [offset[:, 0, :0].cpu()]
        for t, h, w in grids:
            h, w = h // cfg.vision.spatial_merge_size, w // cfg.vision.spatial_merge_size
            places.append(within_picture(t, h, w))
            first += [max(h, w)] + [0] * (t * h * w - 1)      # the first token moves on for the picture
            back += [max(h, w)] * (t * h * w)
        if len(back) != int(is_image.sum()):
            raise ValueError(f"the text has {int(is_image.sum())} image tokens, the pictures give {len(back)}")
        step[is_image] = torch.tensor(first, device=ids.device)
        offset[:, is_image] = torch.cat(places, dim=1).to(ids.device) - torch.tensor(back, device=ids.device)
    offset[:, ~is_image] -= 1
    return (step.cumsum(1) + offset).clamp_min(0)


@lru_cache(256)
def within_picture(t, h, w):
    """Time, which is 0, row and column of each of a picture's tokens, (3, t * h * w)."""
    place = torch.zeros(3, t * h * w, dtype=torch.long)
    place[1] = torch.arange(h).repeat_interleave(w).repeat(t)
    place[2] = torch.arange(w).repeat(h * t)
    return place


def mrope_cos_sin(positions, cfg, dtype):
    """Cosines and sines for `rotate`. Frequencies take their axis in turn: t h w t h w ..., at last t alone."""
    d = cfg.head_dim
    inv_freq = cfg.rope_theta ** (-torch.arange(0, d, 2, device=positions.device).float() / d)  # (d / 2,)
    angle = positions[..., None].float() * inv_freq            # (3, B, T, d / 2) fp32: angles are large
    axis = torch.zeros(d // 2, dtype=torch.long, device=positions.device)
    axis[1:3 * cfg.mrope_section[1]:3] = 1
    axis[2:3 * cfg.mrope_section[2]:3] = 2
    angle = torch.where(axis == 0, angle[0], torch.where(axis == 1, angle[1], angle[2]))[:, :, None]  # (B, T, 1, d / 2)
    return turn(angle, dtype)


def turn(angle, dtype):
    """(..., d / 2) -> what `rotate` multiplies with, each (..., d): cosines, and sines that are negative in the first half."""
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x, rope):
    """Turn each pair (x[i], x[i + d / 2]) by its angle. x: (..., d), rope: see `turn`."""
    cos, sin = rope
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


# ------------------------------------------------------------------------------ vision tower


class VisionModel(nn.Module):
    """Patches -> image tokens. Patches come grouped by the merge x merge squares that become one token."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = PatchEmbed(cfg)
        self.pos_embed = embedding(cfg.num_position_embeddings, cfg.hidden_size)
        self.blocks = nn.ModuleList([VisionBlock(cfg) for _ in range(cfg.depth)])
        self.merger = PatchMerger(cfg, norm_merged=False)
        self.deepstack_merger_list = nn.ModuleList(
            [PatchMerger(cfg, norm_merged=True) for _ in cfg.deepstack_visual_indexes])

    def forward(self, pixel_values, grid_thw):
        grids = grid_thw.tolist()
        sizes = [t * h * w for t, h, w in grids]                            # N per picture
        x = self.patch_embed(pixel_values)                                  # (sum N, E)
        table = {g: (self.position_table(*g), *self.rotary(*g)) for g in {tuple(g) for g in grids}}
        position, cos, sin = (torch.cat([table[tuple(g)][i] for g in grids]) for i in range(3))
        x = x + position.to(x.dtype)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x, (cos, sin), sizes)                                 # (sum N, E)
            if i in self.cfg.deepstack_visual_indexes:
                place = self.cfg.deepstack_visual_indexes.index(i)
                outputs.append(self.deepstack_merger_list[place](x))        # (sum M, D)
        features = torch.stack([self.merger(x), *outputs])                  # (1 + DeepStack, sum M, D)
        return list(features.split([n // self.cfg.spatial_merge_size**2 for n in sizes], dim=1))

    def position_table(self, t, h, w):
        """Learned square of positions, resampled to h x w (bilinear, corners aligned), in merge order: (N, E)."""
        side = math.isqrt(self.cfg.num_position_embeddings)
        square = self.pos_embed.weight.T.float().view(1, -1, side, side)
        grid = F.interpolate(square, size=(h, w), mode="bilinear", align_corners=True)[0]    # (E, h, w)
        return merge_order(grid.permute(1, 2, 0), self.cfg.spatial_merge_size).repeat(t, 1)

    def rotary(self, t, h, w):
        """Angles of a patch: half of the frequencies turn by its row, half by its column. Two of (N, 1, d)."""
        half, device = self.cfg.head_dim // 2, self.pos_embed.weight.device
        inv_freq = self.cfg.rope_theta ** (-torch.arange(0, half, 2, device=device).float() / half)
        row, column = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        place = merge_order(torch.stack([row, column], -1), self.cfg.spatial_merge_size).repeat(t, 1)  # (N, 2)
        angle = (place[..., None] * inv_freq).flatten(1)[:, None]           # (N, 1, d / 2)
        return turn(angle, torch.float32)


def merge_order(grid, merge):
    """(h, w, C) -> (h * w, C), the patches of one merge x merge square side by side."""
    h, w, C = grid.shape
    return grid.reshape(h // merge, merge, w // merge, merge, C).transpose(1, 2).reshape(h * w, C)


class PatchEmbed(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        kernel = (cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
        self.proj = nn.Conv3d(cfg.in_channels, cfg.hidden_size, kernel, stride=kernel)

    def forward(self, pixel_values):
        # A convolution whose kernel is its stride is one matrix product, and much faster so.
        weight = self.proj.weight.flatten(1)                                # (E, 3 * temporal * p * p)
        return F.linear(pixel_values.to(weight.dtype), weight, self.proj.bias)


class VisionBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.hidden_size, eps=1e-6)
        self.attn = VisionAttention(cfg)
        self.norm2 = nn.LayerNorm(cfg.hidden_size, eps=1e-6)
        self.mlp = VisionMLP(cfg)

    def forward(self, x, rope, sizes):
        x = x + self.attn(self.norm1(x), rope, sizes)
        return x + self.mlp(self.norm2(x))


class VisionAttention(nn.Module):
    """Every patch attends to all patches of its own picture."""

    def __init__(self, cfg):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.hidden_size, 3 * cfg.hidden_size)
        self.proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x, rope, sizes):
        q, k, v = self.qkv(x).view(len(x), 3, self.num_heads, -1).unbind(1)     # each (sum N, heads, d)
        q, k = rotate(q.float(), rope).to(v.dtype), rotate(k.float(), rope).to(v.dtype)
        if len(set(sizes)) == 1:                                        # pictures of one size: one call
            out = attend(*(z.view(len(sizes), sizes[0], *z.shape[1:]) for z in (q, k, v)))      # (pictures, N, E)
        else:
            out = torch.cat([attend(*(z[None] for z in part)) for part in zip(*(z.split(sizes) for z in (q, k, v)))], 1)
        return self.proj(out.reshape(x.shape))


class VisionMLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.linear_fc1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.linear_fc2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x):
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class PatchMerger(nn.Module):
    """merge x merge patches -> one token of the decoder's width. DeepStack's mergers normalise after merging."""

    def __init__(self, cfg, norm_merged):
        super().__init__()
        self.width = cfg.hidden_size * cfg.spatial_merge_size**2
        self.norm = nn.LayerNorm(self.width if norm_merged else cfg.hidden_size, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.width, self.width)
        self.linear_fc2 = nn.Linear(self.width, cfg.out_hidden_size)

    def forward(self, x):
        x = self.norm(x.view(-1, *self.norm.normalized_shape)).view(-1, self.width)  # (M, merge**2 * E)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))                              # (M, D)


# ------------------------------------------------------------------------------ cache


class Cache:
    """Keys and values of earlier tokens. Samples of one prompt share its row and its prefix, till they part too far."""

    def __init__(self, cfg, rows, dtype, device, spare=0):
        """Of so many rows, with room for some more."""
        self.sizes = cfg.num_hidden_layers, cfg.num_key_value_heads, cfg.head_dim
        self.kind = {"dtype": dtype, "device": device}
        self.rows, self.end = rows, 0                            # rows and slots in use; the forward moves the end on
        self.k, self.v, self.segments = self._room(rows + spare, 0)

    def _room(self, rows, slots):
        slots += -slots % 8                                      # CUDA's attention wants its masks aligned
        L, K, d = self.sizes
        k, v = (torch.empty(L, rows, K, slots, d, **self.kind) for _ in range(2))               # (L, B, K, S, d)
        return k, v, torch.zeros(rows, slots, dtype=torch.long, device=self.kind["device"])     # (B, S) nobody's

    def _grow(self, rows, slots):
        old, R, S = (self.k, self.v, self.segments), self.rows, self.end
        self.k, self.v, self.segments = self._room(rows, slots)
        for new, was in zip((self.k, self.v), old):
            new[:, :R, :, :S] = was[:, :R, :, :S]
        self.segments[:R, :S] = old[2][:R, :S]

    def make_room(self, more):
        """So many more tokens will fit. It grows little by little: most groups end long before the longest answer."""
        if self.end + more > self.segments.shape[1]:
            self._grow(len(self.segments), self.end + max(more, ROOM))

    def arrange(self, row, most=None):
        """A place for each of N nodes, given the row of each, (N,) rising: their order by row, and row and column of each
        in that order, (N,) each.

        Where a row has more than `most` of them, by default as many as rows have on average, those beyond go on in a copy of
        it: all rows are computed as wide as the widest. Those in whose row no node is left are gone; others take their places.
        """
        first = torch.searchsorted(row, row)                                # (N,) the row's first node
        number = torch.arange(len(row), device=row.device)
        most = most or -(-len(row) // int((number == first).sum()))
        column = (number - first) % most
        lead = (column == 0).nonzero()[:, 0]                                # (R,) the first node of each row there will be
        source, S = row[lead], self.end
        stays = (first[lead] == lead) & (source < len(lead))
        free = torch.ones(len(lead), dtype=torch.bool, device=row.device).index_fill(0, source[stays], False)
        moved, places, source = free.nonzero()[:, 0], source.clone(), source[~stays]
        places[~stays] = moved
        if len(lead) > len(self.segments):
            self._grow(len(lead) + len(lead) // 4, S + ROOM)
        if len(moved):
            for buffer in (self.k, self.v):
                buffer[:, moved, :, :S] = buffer[:, source, :, :S]
            self.segments[moved, :S] = self.segments[source, :S]
        self.rows = len(lead)
        row = places[(column == 0).cumsum(0) - 1]                           # (N,)
        order = (row * most + column).argsort()
        return order, row[order], column[order]

    def write(self, layer, k, v):
        """k, v: (B, T, K, d) of new tokens -> those of all slots up to them, (B, S, K, d)."""
        stop = self.end + k.shape[1]
        for buffer, new in ((self.k, k), (self.v, v)):
            buffer[layer, :self.rows, :, self.end:stop] = new.transpose(1, 2)
        return (buffer[layer, :self.rows, :, :stop].transpose(1, 2) for buffer in (self.k, self.v))


ROOM = 48       # slots that a cache grows by
MANY = 64       # prompts, of fewer no row is copied: at 16 it costs more than narrow rows spare, at 132 it spares a sixth


class CapturedStep:
    """One decoding step as a CUDA graph: a replay launches the whole network at once.

    What it reads stays in place: the batch is copied in, and the cache goes on at `end`. Shapes are fixed, so when rows
    leave, another is captured. Between its matrix products, which take three quarters of the time, a layer has six launches
    of the kernels below, where the plain way has some twenty.
    """

    def __init__(self, model, cache, batch, steps):
        self.text, self.cache, self.batch = model.text, cache, replace(batch, **{name: getattr(batch, name).clone() for name in self.READ})
        B, W = batch.segments.shape
        cache.make_room(W * steps)
        for buffer in (cache.k, cache.v):
            buffer[:, :, :, cache.end:] = 0             # times 0 it must be 0, whatever was there
        own = torch.arange(B * W, device=model.device)
        packing = batch.packing or Packing(own.view(B, W), own[None])
        self.spread, self.place = packing.spread.contiguous(), packing.pack[0]                          # (B, W), (N,)
        self.end = torch.full((), cache.end, dtype=torch.int, device=model.device)
        self.part = 256 // cache.k.element_size()       # slots that a program of attention reads: what its memory has room for
        self.qkv = [joined(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj) for layer in self.text.layers]
        gates = [(layer.mlp.gate_proj, layer.mlp.up_proj) for layer in self.text.layers]
        size = 2 * len(gates) * model.cfg.text.intermediate_size * model.cfg.text.hidden_size * cache.k.element_size()
        memory = torch.cuda.get_device_properties(model.device).total_memory    # used or not: numbers must not hang on what else runs
        self.gate_up = [joined(*pair, copy=size < memory / 16) for pair in gates]
        side = CapturedStep.side = CapturedStep.side or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        self.graph = torch.cuda.CUDAGraph()
        kind = self.text.cfg, model.device, cache.k.dtype, W, power_of_2(self.parts())  # what the kernels below are made for
        with torch.cuda.stream(side):
            if kind not in CapturedStep.known:          # what is made and set up at a first call must not be captured
                self.compute()
                CapturedStep.known.add(kind)
            pool = () if CapturedStep.last is None else (CapturedStep.last.pool(),)
            self.graph.capture_begin(*pool)             # not torch.cuda.graph: it empties the allocator's cache
            self.hidden = self.compute()                                    # (1, N, D)
            self.graph.capture_end()
        CapturedStep.last = self.graph
        torch.cuda.current_stream().wait_stream(side)

    READ = ("input_ids", "position_ids")
    side = None         # the stream that all are captured on
    known = set()
    last = None         # kept until another is captured, in the same memory: of its own, torch would keep it for each

    def __call__(self, batch):
        for name in self.READ:
            getattr(self.batch, name).copy_(getattr(batch, name))
        end, self.cache.end = self.cache.end, self.cache.end + batch.segments.shape[1]
        self.cache.segments[:self.cache.rows, end:self.cache.end] = batch.segments
        self.end.fill_(end)
        self.graph.replay()
        return self.hidden

    def parts(self):
        return -(-self.cache.segments.shape[1] // self.part)

    def compute(self):
        """What TextModel does, of tokens alone: (1, N, D)."""
        cfg, cache, (B, W), S = self.text.cfg, self.cache, self.spread.shape, self.cache.segments.shape[1]
        H, K, d, F, eps = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.intermediate_size, cfg.rms_norm_eps
        width, rows, parts = (max(16, power_of_2(n)) for n in (d, min(64, W * H // K), self.parts()))   # 16: tl.dot's least
        x = self.text.embed_tokens(self.batch.input_ids).flatten(0, 1)                                  # (N, D)
        N, D = x.shape
        cos, sin = mrope_cos_sin(self.batch.position_ids, cfg, x.dtype)                                 # (1, N, 1, d)
        q, seen, inner = x.new_empty(N, H, d), x.new_empty(N, H * d), x.new_empty(N, F)
        total, most, mass = (x.new_empty(self.parts(), N, H, *last, dtype=torch.float) for last in ((d,), (), ()))

        def add_norm(more, norm):
            out = torch.empty_like(x)
            add_norm_kernel[(N,)](x, more, norm.weight, out, eps, D, power_of_2(D), num_warps=8)
            return out

        read = self.text.layers[0].input_layernorm(x)
        for i, (layer, qkv, gate_up) in enumerate(zip(self.text.layers, self.qkv, self.gate_up)):
            attention, mlp, k, v = layer.self_attn, layer.mlp, cache.k[i], cache.v[i]
            turn_kernel[(N, -(-(H + 2 * K) // 8))](qkv(read), cos, sin, attention.q_norm.weight, attention.k_norm.weight, q, k, v,
                                                   self.place, self.end, W, S, eps, H, K, d, width, num_warps=4)
            attend_kernel[(B * -(-W * H // K // rows), K, self.parts())](
                q, k, v, cache.segments, self.spread, self.end, total, most, mass, N, W, S, d**-0.5, H // K, K, d, width, rows,
                PADDING, self.part, num_warps=4)
            gather_kernel[(N * H,)](total, most, mass, self.end, seen, N, W, H, d, width, parts, self.part, num_warps=1)
            read = add_norm(attention.o_proj(seen), layer.post_attention_layernorm)
            silu_kernel[(N, -(-F // 1024))](gate_up(read), inner, F, 1024)
            following = self.text.layers[i + 1].input_layernorm if i + 1 < len(self.text.layers) else self.text.norm
            read = add_norm(mlp.down_proj(inner), following)
        return read[None]


def joined(*layers, copy=True):
    """Linear layers that read the same as one function: (N, D) -> (N, all their widths).

    One product of a copy of their weights is quicker than two. Adapters stay apart, and what must not be copied.
    """
    if not copy or not all(type(layer) is nn.Linear for layer in layers):
        return lambda x: torch.cat([layer(x) for layer in layers], -1)
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return lambda x: F.linear(x, weight, bias)


def later(count):
    """A number on a GPU, (), asked for now: a function that gives it, and waits for nothing that was launched since."""
    sent, heard = torch.empty(count.shape, dtype=count.dtype, pin_memory=True).copy_(count, non_blocking=True), torch.cuda.Event()
    heard.record()
    return lambda: heard.synchronize() or int(sent)


def power_of_2(n):
    """The next one that is no less: what a kernel's blocks want to be."""
    return 1 << (n - 1).bit_length()


@lru_cache
def kernels_work(device):
    """Whether Triton can make one here: it wants a GPU that it knows, a C compiler and Python's headers."""
    try:
        drawn_from(torch.zeros(1, 128, device=device), 1.0, torch.zeros(1, 1, dtype=torch.float64, device=device))
    except Exception as error:      # whatever it is, there is another way
        warnings.warn(f"decoding goes the plain way, which is slower: Triton makes no kernel here ({first_line(error)})")
        return False
    return True


def kernel(function):
    """Made when first called, for each value of its tl.constexpr arguments; how many tokens and slots there are is none."""
    return triton.jit(function, do_not_specialize=["N", "W", "S"]) if triton else function


def drawn_from(logits, temperature, point):
    """What `distribution` and `pick` give without a nucleus: tokens and their log-probabilities in nats, (N, G) each.

    logits: (N, V) on a GPU, read once: no float32 copy of them is made and passed over. point: (N, G) float64 in [0, 1).
    """
    (N, V), b = logits.shape, math.gcd(logits.shape[1], 128)
    n = V // b
    sums, most = (torch.empty(N, width, device=logits.device) for width in (n, -(-n // 32)))
    drawn, logp = (torch.empty(point.shape, dtype=kind, device=logits.device) for kind in (torch.long, torch.float))    # (N, G)
    weigh_kernel[(N, most.shape[1])](logits, temperature, sums, most, n, b)
    pick_kernel[point.shape](logits, temperature, sums, most, point, drawn, logp, n, power_of_2(n), b)
    return drawn, logp


@kernel
def weigh_kernel(logits, temperature, sums, mosts, BLOCKS: "tl.constexpr", b: "tl.constexpr"):
    """A program 32 blocks of a row of logits: sums (N, V / b) of p = exp(logit / temperature - most), mosts (N, parts)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block, i = part * 32 + tl.arange(0, 32), tl.arange(0, b)
    inside = block < BLOCKS
    value = tl.load(logits + (row * BLOCKS + block[:, None]) * b + i[None], inside[:, None], float("-inf")).to(tl.float32) / temperature
    most = tl.maximum(tl.max(tl.max(value, 1), 0), -1e30)                   # all may be forbidden tokens
    tl.store(sums + row * BLOCKS + block, tl.sum(tl.exp(value - most), 1), inside)
    tl.store(mosts + row * tl.num_programs(1) + part, most)


@kernel
def pick_kernel(logits, temperature, sums, mosts, points, drawn, logp, BLOCKS: "tl.constexpr", WIDTH: "tl.constexpr", b: "tl.constexpr"):
    """A program a number of points (N, G): where it falls, as `pick` finds it in what `weigh_kernel` gave.

    drawn, logp: (N, G), what is there and its log-probability in nats.
    """
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    block, i, parts = tl.arange(0, WIDTH), tl.arange(0, b), (BLOCKS + 31) // 32
    inside = block < BLOCKS
    most = tl.load(mosts + row * parts + block // 32, inside, float("-inf"))                            # (WIDTH,)
    highest = tl.max(most, 0)
    mass = tl.cumsum((tl.load(sums + row * BLOCKS + block, inside, 0.0) * tl.exp(most - highest)).to(tl.float64), 0)
    whole = tl.max(mass, 0)
    aim = tl.load(points + place) * whole
    chosen = tl.minimum(tl.sum((mass <= aim).to(tl.int32), 0), BLOCKS - 1)
    value = tl.load(logits + (row * BLOCKS + chosen) * b + i).to(tl.float32) / temperature              # (b,)
    p = tl.exp(value - highest)
    inner = tl.cumsum(p.to(tl.float64), 0)
    rest = tl.maximum(aim - tl.max(tl.where(block == chosen, mass, 0.0), 0) + tl.max(inner, 0), 0.0)
    token = tl.minimum(tl.sum((inner <= rest).to(tl.int32), 0), tl.max(tl.where(p > 0, i, 0), 0))       # both are rounded
    tl.store(drawn + place, chosen * b + token)
    tl.store(logp + place, tl.max(tl.where(i == token, value, float("-inf")), 0) - highest - tl.log(whole))


@kernel
def turn_kernel(qkv, cos, sin, q_scale, k_scale, q, k, v, places, end, W, S, eps,
                H: "tl.constexpr", K: "tl.constexpr", d: "tl.constexpr", WIDTH: "tl.constexpr"):
    """Eight heads of a token a program: queries and keys normalised and turned, keys and values into the cache.

    qkv: (N, (H + 2 K) d); cos, sin: (N, d), see `turn`; q: (N, H, d); k, v: (B, K, S, d); places: (N,) in (B * W).
    """
    n, h, i = tl.program_id(0), tl.program_id(1) * 8 + tl.arange(0, 8)[:, None], tl.arange(0, WIDTH)[None]
    inside, j = (h < H + 2 * K) & (i < d), (i + d // 2) % d                 # j: the other of the pair
    head = qkv + (n * (H + 2 * K) + h) * d
    value, other = tl.load(head + i, inside, 0.0), tl.load(head + j, inside, 0.0)                       # (8, WIDTH)
    exact = value.to(tl.float32)
    norm = tl.rsqrt(tl.sum(exact * exact, 1) / d + eps)[:, None]
    scale = tl.where(h < H, tl.load(q_scale + i, i < d, 0.0), tl.load(k_scale + i, i < d, 0.0)).to(tl.float32)
    other_scale = tl.where(h < H, tl.load(q_scale + j, i < d, 0.0), tl.load(k_scale + j, i < d, 0.0)).to(tl.float32)
    mine = (exact * norm * scale).to(value.dtype).to(tl.float32)            # rounded where the plain way does
    other = (other.to(tl.float32) * norm * other_scale).to(value.dtype).to(tl.float32)
    turned = (mine * tl.load(cos + n * d + i, i < d, 0.0).to(tl.float32)).to(value.dtype).to(tl.float32)
    turned += other * tl.load(sin + n * d + i, i < d, 0.0).to(tl.float32)
    place = tl.load(places + n)
    slot = (place // W * K + (h - H) % K) * S + tl.load(end) + place % W
    tl.store(q + (n * H + h) * d + i, turned, inside & (h < H))
    tl.store(k + slot * d + i, turned, inside & (h >= H) & (h < H + K))
    tl.store(v + slot * d + i, value, inside & (h >= H + K))


@kernel
def attend_kernel(q, k, v, segments, spread, end, totals, mosts, masses, N, W, S, scale, R: "tl.constexpr", K: "tl.constexpr",
                  d: "tl.constexpr", WIDTH: "tl.constexpr", ROWS: "tl.constexpr", PADDING: "tl.constexpr", PART: "tl.constexpr"):
    """A program a key head of a prompt and a part of its slots, which its queries, R heads of each of W tokens, read ROWS at a time.

    q: (N, K R, d); k, v: (B, K, S, d); segments: (B, S), see Batch; spread: (B, W) places in N. What it saw, with p = exp of
    score - most: totals (parts, N, K R, d), the sum of p v; mosts, masses (parts, N, K R), the highest score and the sum of p.
    """
    tiles, head, part = tl.cdiv(W * R, ROWS), tl.program_id(1), tl.program_id(2)
    b, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    start = tl.load(end)
    if part * PART < start + W:
        r, i, slot = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), part * PART + tl.arange(0, PART)
        w, inside, there = r // R, i < d, slot < start + W
        mine = tl.load(segments + b * S + start + w, w < W, 0)                                          # (ROWS,)
        row = (tl.load(spread + b * W + w, w < W, 0) * K + head) * R + r % R
        queries = tl.load(q + row[:, None] * d + i[None], (w < W)[:, None] & inside[None], 0.0)         # (ROWS, WIDTH)
        place = ((b * K + head) * S + slot)[:, None] * d + i[None]
        keys = tl.load(k + place, there[:, None] & inside[None], 0.0)                                   # (PART, WIDTH)
        values = tl.load(v + place, there[:, None] & inside[None], 0.0)
        sees = (mine[:, None] & tl.load(segments + b * S + slot, there, 0)[None]) != 0                  # (ROWS, PART)
        score = tl.where(sees, tl.dot(queries, keys.T, input_precision="ieee") * scale, float("-inf"))
        most = tl.maximum(tl.max(score, 1), -1e30)      # who sees nothing here must not take -inf from -inf
        p = tl.exp(score - most[:, None])
        said, row = (w < W) & (mine != PADDING), part * N * K * R + row
        tl.store(mosts + row, most, said)
        tl.store(masses + row, tl.sum(p, 1), said)
        total = tl.dot(p.to(values.dtype), values, input_precision="ieee")
        tl.store(totals + row[:, None] * d + i[None], total, said[:, None] & inside[None])


@kernel
def gather_kernel(totals, mosts, masses, end, out, N, W, H: "tl.constexpr", d: "tl.constexpr", WIDTH: "tl.constexpr",
                  PARTS: "tl.constexpr", PART: "tl.constexpr"):
    """A program a token's head: what its parts saw, see above, together. out: (N, H d)."""
    row, part, i = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, WIDTH)
    there, place, inside = part * PART < tl.load(end) + W, part * N * H + row, i < d
    most = tl.load(mosts + place, there, -1e30)                             # (PARTS,)
    weight = tl.exp(most - tl.max(most, 0))
    mass = tl.sum(weight * tl.load(masses + place, there, 0.0), 0)
    total = tl.load(totals + place[:, None] * d + i[None], there[:, None] & inside[None], 0.0)          # (PARTS, WIDTH)
    tl.store(out + row * d + i, tl.sum(weight[:, None] * total, 0) / mass, inside)


@kernel
def add_norm_kernel(x, more, scale, out, eps, D: "tl.constexpr", WIDTH: "tl.constexpr"):
    """x += more, and out = RMSNorm(x): (N, D) each; a program a token."""
    column = tl.arange(0, WIDTH)
    place, inside = tl.program_id(0) * D + column, column < D
    value = tl.load(x + place, inside, 0.0) + tl.load(more + place, inside, 0.0)
    tl.store(x + place, value, inside)
    value = value.to(tl.float32)
    norm = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    tl.store(out + place, value * norm * tl.load(scale + column, inside, 0.0).to(tl.float32), inside)


@kernel
def silu_kernel(both, out, F: "tl.constexpr", BLOCK: "tl.constexpr"):
    """silu(gate) * up. both: (N, 2 F), gates first; out: (N, F)."""
    row, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both + 2 * row * F + i, i < F, 0.0)
    up = tl.load(both + (2 * row + 1) * F + i, i < F, 0.0)
    exact = gate.to(tl.float32)
    tl.store(out + row * F + i, (exact * tl.sigmoid(exact)).to(gate.dtype) * up, i < F)


# ------------------------------------------------------------------------------ chat and pictures


class Processor:
    """Chats with pictures -> Batch, as Qwen3-VL's own tokenizer, chat template and image processor do it."""

    def __init__(self, tokenizer, image_settings):
        """image_settings: what preprocessor_config.json holds. Raises ValueError where a number of it is absurd."""
        self.tokenizer = tokenizer
        self.special = tokenizer.all_special_tokens + [str(t) for t in tokenizer.added_tokens_decoder.values()]
        self.patch = image_settings.get("patch_size", 16)
        self.temporal = image_settings.get("temporal_patch_size", 2)
        self.merge = image_settings.get("merge_size", 2)
        self.mean = np.array(image_settings.get("image_mean", [0.5] * 3), np.float32)
        self.std = np.array(image_settings.get("image_std", [0.5] * 3), np.float32)
        size = image_settings.get("size") or {}
        self.min_pixels = image_settings.get("min_pixels") or size.get("shortest_edge", 65536)
        self.max_pixels = image_settings.get("max_pixels") or size.get("longest_edge", 16777216)
        for name, value, most in (("patch_size", self.patch, 64), ("temporal_patch_size", self.temporal, 2),
                                  ("merge_size", self.merge, 4), ("size.longest_edge", self.max_pixels, 2**24),
                                  ("size.shortest_edge", self.min_pixels, self.max_pixels)):
            if type(value) is not int or not 0 < value <= most:
                raise ValueError(f"{name} is {value!r}; a whole number from 1 to {most} is needed")
        if not (self.mean.shape == self.std.shape == (3,) and (abs(self.mean) < 9).all() and (self.std > 1e-3).all()):
            raise ValueError("image_mean and image_std must be three numbers each, those of image_std above 0")

    def __call__(self, conversations, add_generation_prompt=True):
        """Chats in the Hugging Face messages form; pictures as PIL images or paths. Returns a left-padded Batch.

        Raises ValueError for a picture that cannot be read and for videos.
        """
        pictures = [[self.pixels(image) for image in images_of(chat)] for chat in conversations]
        batch = self.tokens(conversations, [[grid for _, grid in row] for row in pictures], add_generation_prompt)
        flat = [patches for row in pictures for patches, _ in row]
        batch.pixel_values = torch.cat(flat) if flat else None
        return batch

    def tokens(self, conversations, grids, add_generation_prompt=True):
        """The text half: chats and the grids (1, h, w) of their pictures -> Batch without pixels."""
        pieces = []                 # of all chats: (number of the chat, whether somebody typed it, text)
        for number, (chat, row) in enumerate(zip(conversations, grids)):
            chat, typed = self._set_aside_typed_tokens(chat)
            text = self.tokenizer.apply_chat_template(chat, tokenize=False,
                                                      add_generation_prompt=add_generation_prompt)
            head, *rest = text.split(IMAGE_PAD)
            if len(rest) != len(row):
                raise ValueError(f"the chat has {len(row)} pictures but its text has {len(rest)} {IMAGE_PAD}")
            for (_, h, w), part in zip(row, rest):
                head += IMAGE_PAD * (h * w // self.merge**2) + part
            for piece in re.split(f"({MARK}[0-9]+{MARK})", head):
                mark = piece.startswith(MARK) and piece.strip(MARK).isdigit()
                pieces.append((number, mark, typed[int(piece.strip(MARK))] if mark else piece))
        # In one call, which takes a fraction of the time of many.
        read = iter(self.tokenizer([text for _, mark, text in pieces if not mark], add_special_tokens=False)["input_ids"])
        rows = [[] for _ in conversations]
        for number, mark, text in pieces:
            rows[number] += self.plain(text) if mark else next(read)
        T = max(map(len, rows))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[pad] * (T - len(row)) + row for row in rows])                  # (B, T)
        mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])        # (B, T)
        flat = [grid for row in grids for grid in row]
        return Batch(ids, mask, image_grid_thw=torch.tensor(flat) if flat else None)

    def plain(self, text):
        """Token ids of a text, or of each of several, as it is: what spells a special token in it is text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []

    def _set_aside_typed_tokens(self, chat):
        """Texts that spell a special token are text: they must not open a turn or a picture.

        Such a text leaves a mark in the chat, to be put in after the template; returns (chat, the texts set aside).
        """
        typed = []

        def clean(text):
            if not any(token in text for token in self.special) and MARK not in text:
                return text
            typed.append(text)
            return f"{MARK}{len(typed) - 1}{MARK}"

        def content(value):
            if isinstance(value, str):
                return clean(value)
            return [{**part, "text": clean(part["text"])} if part.get("type") == "text" else part for part in value]

        return [{**message, "content": content(message["content"])} for message in chat], typed

    def pixels(self, image):
        """One picture -> patches (N, 3 * temporal * p * p) in merge order, and its grid (1, h, w)."""
        image = open_image(image)
        factor = self.patch * self.merge
        height, width = smart_resize(image.height, image.width, factor, self.min_pixels, self.max_pixels)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        x = (np.asarray(image, np.float32) / 255 - self.mean) / self.std            # (height, width, 3)
        h, w, m, p = height // self.patch, width // self.patch, self.merge, self.patch
        x = x.reshape(h // m, m, p, w // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)  # (h/m, w/m, m, m, 3, p, p)
        x = np.repeat(x.reshape(h * w, 3, 1, p, p), self.temporal, axis=2)   # a still picture, repeated
        return torch.from_numpy(x.reshape(h * w, -1)), (1, h, w)

    def decode(self, tokens, begun=None):
        """(n, T) token ids -> n texts without special tokens. begun: n texts, what stands before each."""
        rows = list(map(tuple, tokens.tolist()))
        once = list(dict.fromkeys(rows))            # samples of a prompt often say the same
        text = dict(zip(once, self.tokenizer.batch_decode(once, skip_special_tokens=True)))
        return [(before + text[row]).strip() for before, row in zip(begun or [""] * len(rows), rows)]

    @classmethod
    def from_pretrained(cls, path_or_hub_name, offline=False):
        """Read tokenizer and image settings. Raises ValueError where the tokenizer lacks what Qwen3-VL needs."""
        folder = checkpoint_folder(path_or_hub_name, offline)
        from transformers import AutoTokenizer
        try:
            with hushed():
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except BaseException as error:      # its readers raise anything; its Rust half panics, which is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{folder}: the tokenizer cannot be read ({first_line(error)})") from None
        missing = [t for t in SPECIAL_TOKENS if t not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(f"{folder}: the tokenizer has no {' '.join(missing)}; Qwen3-VL's own is needed")
        if not tokenizer.chat_template:
            raise ValueError(f"{folder}: the tokenizer has no chat template")
        tokenizer.padding_side = "left"
        settings = folder / "preprocessor_config.json"
        found = read_json(settings) if settings.exists() else {}
        try:
            processor = cls(tokenizer, found)
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{settings}: {first_line(error)}") from None
        processor.folder = folder
        processor.check_template()
        return processor

    def check_template(self):
        """A picture and every special token, spelled as text, go through the chat template and come out as such."""
        try:
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "".join(SPECIAL_TOKENS)}]}]
            ids = self.tokens([chat], [[(1, self.merge, self.merge)]]).input_ids[0].tolist()
            text = self.tokenizer.decode(ids)
        except Exception as error:      # a template is a program: it raises anything
            raise ValueError(f"{self.folder}: the chat template does not work ({first_line(error)})") from None
        if "".join(SPECIAL_TOKENS) not in text or ids.count(self.tokenizer.convert_tokens_to_ids(IMAGE_PAD)) != 1:
            raise ValueError(f"{self.folder}: the chat template loses text or picture, or {IMAGE_PAD} is not special")

    def save_pretrained(self, directory):
        """Copy tokenizer and image settings beside a saved model, unchanged."""
        for name in PROCESSOR_FILES:
            if (self.folder / name).exists():
                write_aside(Path(directory) / name, (self.folder / name).read_bytes())
        if not any((self.folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
            template = self.tokenizer.chat_template.encode()        # AutoProcessor does not look into the tokenizer's
            write_aside(Path(directory) / "chat_template.jinja", template)


IMAGE_PAD = "<|image_pad|>"
MARK = "\ue000"        # a private-use character: no text has it but ours
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE_PAD)
PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
                   "added_tokens.json", "chat_template.json", "chat_template.jinja", "preprocessor_config.json",
                   "video_preprocessor_config.json", "processor_config.json")


@contextmanager
def hushed():
    """Nothing gets to stderr: before it panics, the Rust half of a tokenizer writes there on its own."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def images_of(chat):
    """The pictures of a chat, in order."""
    items = [item for message in chat if not isinstance(message["content"], str) for item in message["content"]]
    for item in items:
        if item.get("type") not in ("image", "text"):
            raise ValueError(f"a message holds {item.get('type')!r}; only 'text' and 'image' are supported")
        if item["type"] not in item:
            raise ValueError(f"a message has an item of type {item['type']!r} without its {item['type']!r}")
    return [item["image"] for item in items if item["type"] == "image"]


def open_image(image):
    """A PIL image or a path -> RGB, turned as its EXIF tag says."""
    if isinstance(image, Image.Image):          # transformers puts a transparent PIL image on white, a file it does not
        check_size(*image.size)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return rgb(image)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(image, formats=PICTURE_FORMATS) as opened:
            check_size(*opened.size)                                        # the header's: nothing is decoded yet
            ImageOps.exif_transpose(opened, in_place=True)                  # a copy less, of what may be large
            return rgb(opened)
    except FileNotFoundError:
        raise ValueError(f"{image}: no such picture") from None
    except Exception as error:          # Pillow's readers raise anything
        raise ValueError(f"{image}: not a picture that can be read ({first_line(error)})") from None


PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")      # others start a program (EPS)
MOST_PIXELS = 3 * 2**24         # a camera of 50 megapixels; decoded and copied, 8 bytes each


def check_size(width, height):
    if not 0 < width * height <= MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels; at least 1 and at most {MOST_PIXELS} are read")
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"{width} x {height} pixels are too long; one side may be 200 times the other at most")


def rgb(image):
    """Eight bits per colour. Pillow takes 16-bit grey for 8-bit grey, and all but the darkest for white."""
    return (image.convert("I").point(lambda v: v / 257) if image.mode.startswith("I") else image).convert("RGB")


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """The nearest size whose sides are multiples of `factor` and whose area is within the limits, in pixels."""
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return h, w


# ------------------------------------------------------------------------------ checkpoints


def check_tensor(file, name, shape, wanted):
    if name not in wanted:
        raise ValueError(f"{file}: {name} is no tensor of this model")
    if shape != tuple(wanted[name]):
        raise ValueError(f"{file}: {name} has shape {list(shape)}, config.json asks for {list(wanted[name])}")


def check_finite(file, name, value):
    low, high = value.aminmax()         # either is NaN where any element is; takes no memory
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{file}: {name} has values that are NaN or infinite")


def weight_files(folder):
    """The safetensors files of a checkpoint: one, or the shards that the index names."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise FileNotFoundError(f"{folder}: no model.safetensors and no model.safetensors.index.json")
    try:
        names = sorted({*map(str, read_json(index)["weight_map"].values())})
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: no 'weight_map' from tensor names to files") from None
    for name in names:
        if Path(name).name != name or not os.path.isfile(folder / name):
            raise FileNotFoundError(f"{index}: shard {name!r} is not in the folder")
    return [folder / name for name in names]


def checkpoint_folder(path_or_hub_name, offline=False):
    """A directory as it is; any other name is fetched from the hub (safetensors and JSON alone, never pickles).

    offline: it is looked for among what was downloaded before, and nobody is asked.
    """
    folder = Path(path_or_hub_name)
    if folder.is_dir():
        return folder
    if not str(path_or_hub_name).count("/") == 1 or str(path_or_hub_name).startswith((".", "/")):
        raise FileNotFoundError(f"{path_or_hub_name}: no such directory, and no hub name of the form owner/name")
    from huggingface_hub import snapshot_download
    patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(str(path_or_hub_name), allow_patterns=patterns, local_files_only=offline))
    except Exception as error:         # no network, no such name, no permission: each has its own class
        why = "it was not downloaded before, and --offline forbids it now" if offline else \
            f"the hub did not give it ({first_line(error)})"
        raise FileNotFoundError(f"{path_or_hub_name}: no such directory, and {why}") from None


def read_json(path):
    """A JSON file that holds an object -> dict. Raises ValueError that names file and place."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: an object is needed, not {type(value).__name__}")
    return value


def parse_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({first_line(error)})") from None


LARGEST_TEXT = 2**25        # bytes; parsed, JSON takes thirty times as much at worst


def read_text(path):
    """UTF-8, with a byte order mark or without, of a file that is not too large."""
    try:
        if (size := os.path.getsize(path)) > LARGEST_TEXT:
            raise ValueError(f"{path}: {size / 1e6:.0f} MB; at most {LARGEST_TEXT / 1e6:.0f} MB of text are read")
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({first_line(error)})") from None


def write_aside(path, data, mode=0o666):
    """Write bytes so that a reader sees the whole file or none. mode: as `os.open` has it."""
    with aside(path, mode) as part:
        part.write_bytes(data)


@contextmanager
def aside(path, mode=0o666):
    """Another name to write a file under; then it is synced and renamed or, whatever went wrong, removed.

    Raises OSError that names the file where there is no room or no permission.
    """
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)        # one left behind would keep its own mode
    try:
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY, mode))
        yield part
        sync(part)
        os.replace(part, path)
        sync(path.parent)               # the new name too is on the disk
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: cannot be written ({first_line(error)})") from None
    finally:
        part.unlink(missing_ok=True)


def sync(path):
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def first_line(error):
    """What an error says, fit for a terminal: it may quote from a file."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "".join(c if c.isprintable() else "?" for c in line[:500])
