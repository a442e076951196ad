"""ASRU removes private facts about people from Qwen3-VL and leaves it answering well.

Activation Steering meets Reinforcement Unlearning, ICML 2026, arXiv 2605.15687.

    python asru.py --forget data/forget.json

Stage 1, `redirect`: one closed-form change of one down_proj moves the residual stream at the end of
    a forget prompt along v, from "I know" to "I can't tell", and leaves retain prompts where they are.
Stage 2, `optimize_boundary`: GRPO with a hand-made reward (reward.py) sharpens the line between what
    is refused and what is answered: sample a group, reward it, compare within it, take a clipped step.

Read this file downwards, then reward.py, model_qwen3vl.py and eval.py.

Where this differs from the paper or from its released script
 1 Stage 1 is the closed form, as a change of the old weights; the script descends on the same targets.
 2 Direction, targets and edit belong to one position, the last prompt token, which decides how the answer begins. The
   script takes the direction there and trains at the end of the answer.
 3 The direction is taken within each way of asking (with a picture, in words alone), not across them.
 4 Stage 1 also holds still what lies inside answers and refusals: an edit of a matrix acts at every token, and without
   this the words after the first one break up, and the name in a refusal becomes another's.
 5 The key fact must not leak, even inside a refusal; a garbled refusal is none, one about somebody else is half right (reward.py).
 6 Log-probabilities are those of the distribution that was sampled from: temperature, top-p and the
   ban on vision tokens included. p_old is what the sampler found: no pass is made for it.
 7 Unseen people are among the prompts of stage 2: without them the model begins to tell about strangers.
 8 std of a group is the sample's (n - 1); the loss is the mean over response tokens; groups of equal
   rewards are skipped whole, their KL term too.
 9 The boundary set is the nearest neighbours of every forget prompt in turn, within each kind of sample; stage 1 holds each
   kind for itself, with --method asru-paper too.
10 Stage 2 trains the decoder's projections alone: embeddings, head and norms serve every prompt.
11 Prompts whose last group was silent rest: they are drawn less, so that steps go where there is something to learn.
12 What is kept may be a running mean of the weights (--average), not the last step's.
13 Some rollouts may go on with an answer that has begun (--begun): who refuses to begin still knows how to end. Stage 1
   then redirects there too, to where everybody's mean is: where all of a group tell the fact, GRPO learns nothing.
14 Stage 1 may take each forget prompt to where refusing strangers are (--each), not push all along their mean.
15 A forget prompt's group in which nothing is right may be pushed down as a whole (--all-wrong): its best is a lesser wrong.
16 The KL may count less on forget prompts (--kl-forget): what it holds there are stage 1's broken words.
17 The embedded model's settings hold all of the retain set (--boundary 1), at five times the weight (--weight-retain), and
   answers about what anyone can see in the pictures to forget (--hold-visible).
"""
import argparse
import copy
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial, partialmethod
from itertools import chain, cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save, save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from eval import (Prompts, answer_likelihoods, answer_logp, answer_means, answer_tokens, answer_totals, attack,
                  check_device, chunks, command, content_words, encode, evaluate, in_order, in_turn, judge, ks_test,
                  load_samples, opened, prepare, print_answers, print_table, projections, ratio_questions,
                  report, respond, set_signals, set_up_torch, split_sets, truth_ratios, world)
from model_qwen3vl import DecoderLayer, Processor, Qwen3VL, aside, read_json, sent, tree_of, write_aside
from reward import REFUSAL, Reward, contains, is_refusal, names_in, normalize, rouge_l

HERE = Path(__file__).parent
BASELINES = ("ga", "ga_diff", "kl_min", "npo", "idk", "mmunlearner")

# ------------------------------------------------------------------------------ settings


def opt(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Config:
    """Every setting, its default (the paper's, where it has one) and its help; it is the command line too."""
    forget: Path = opt(None, "JSON file of the samples to forget; the other three files lie beside it")
    retain: Path = opt(None, "JSON file of the samples to keep")
    target: Path = opt(None, "JSON file of private questions about people the model has never seen")
    test: Path = opt(None, "JSON file of held-out samples, evaluated and never trained on")
    model: str = opt(str(HERE / "data/tiny-qwen3vl"), "Qwen3-VL checkpoint: a directory or a hub name")
    out: Path = opt(Path("out"), "where model/, metrics.json, samples.jsonl, log.jsonl, report.html go")
    seed: int = opt(0, "seed of every random choice")

    layer: int = opt(None, "stage 1: decoder layer L, from 0; unset: the one at 17/36 of the depth", least=0)
    strength: float = opt(3.0, "stage 1: lambda, how far along v forget activations are to move", least=0)
    strength_begun: float = opt(1.0, "stage 1: how much farther where an answer has begun (--begun), as a multiple", least=0)
    each: bool = opt(False, "stage 1: every forget prompt has a v of its own, from where it is, not their mean")
    hold: int = opt(4, "stage 1: answer tokens per sample that must not move; 0 as in the paper", least=0)
    weight_retain: float = opt(1.0, "stage 1: weight of the boundary prompts, which must not move, and of what is held of "
                               "their answers (--hold, --hold-visible); 1 as in the paper", above=0)
    hold_visible: bool = opt(False, "stage 1 and 2: what anyone can see in the pictures to forget is held and rewarded too: "
                             "visible questions of the retain set, asked of them, in the model's own words")
    ridge: float = opt(1e-4, "stage 1: gamma, as a share of the inputs' squared norm", above=0)
    boundary: float = opt(0.273, "stage 1 and 2: share of the retain set, the nearest, that both use", above=0, most=1)

    steps: int = opt(100, "stage 2: rollout steps", least=0)
    prompts: int = opt(64, "stage 2: prompts per step, Q", least=1)
    group: int = opt(8, "stage 2: responses per prompt, G", least=2, most=62)
    minibatch: int = opt(2, "stage 2: prompts per optimizer step", least=1)
    microbatch: int = opt(16, "stage 2: prompts per forward and backward; for memory alone", least=1)
    recompute: bool = opt(False, "stage 2: make activations again in backward: a third more work, far less memory")
    mix_forget: float = opt(0.375, "stage 2: share of forget prompts", above=0, most=1)
    mix_retain: float = opt(0.375, "stage 2: share of boundary prompts; the rest are target prompts", above=0, most=1)
    begun: float = opt(0.0, "stage 2: share of forget and boundary prompts whose answer has begun, up to the key fact; "
                       "where there are any, stage 1 redirects there too", least=0, most=0.9)
    rest: float = opt(0.7, "stage 2: chance to pass over prompts whose last group said nothing", least=0, most=0.95)
    all_wrong: float = opt(0.0, "stage 2: how far down all of a forget prompt's group is pushed in which nothing is right; 0 "
                           "as in the paper: then the least wrong is taught, and of equals nothing", least=0)
    temperature: float = opt(1.5, "stage 2: sampling temperature", above=0)
    top_p: float = opt(0.95, "stage 2: nucleus of the sampling distribution", above=0, most=1)
    lr: float = opt(1e-6, "stage 2: learning rate of AdamW", above=0)
    lr_end: float = opt(1.0, "stage 2: share of it that is left at the last step; it falls in a line", above=0, most=1)
    weight_decay: float = opt(1e-2, "stage 2: weight decay of AdamW", least=0)
    average: float = opt(0.0, "stage 2: decay of the running mean of the weights that is kept; 0: the last weights",
                         least=0, most=0.999)
    clip: float = opt(0.2, "stage 2: epsilon of the PPO clip", above=0)
    kl: float = opt(0.1, "stage 2: beta, weight of the KL to the stage-1 model", least=0)
    kl_forget: float = opt(1.0, "stage 2: how much of beta counts on forget prompts, where nothing is to stay; 1 as in the "
                           "paper", least=0)
    kl_before: bool = opt(False, "stage 2: on all but forget prompts the KL is to the model before stage 1, which knew all "
                          "that is to stay; by default to the one after it, as in the paper")
    grad_norm: float = opt(1.0, "gradient norm is clipped to this", above=0)
    consistency: float = opt(0.2, "reward: weight of the cross-modal consistency term", least=0, most=0.49)
    rigidity: float = opt(0.2, "reward: weight of the rigidity term", least=0, most=0.49)

    max_new_tokens: int = opt(50, "longest answer, tokens", least=1)
    eval_batch: int = opt(64, "prompts per batch in evaluation", least=1)
    checkpoint: int = opt(20, "stage 2: steps between two checkpoints, for --resume; 0: when stopped alone", least=0)
    resume: bool = opt(False, "go on from the newest checkpoint under --out; settings and data must be the same")
    allow_outside: bool = opt(False, "pictures may lie outside the folder of the JSON file that names them")
    offline: bool = opt(False, "never ask the hub: a --model that is no directory must be downloaded already")
    device: str = opt(None, "cpu, cuda, cuda:1 ...; unset: CUDA where there is one")
    skip_steer: bool = opt(False, "leave out stage 1")
    skip_rl: bool = opt(False, "leave out stage 2")

    first_layer: int = opt(0, "stage 2: the first decoder layer that is trained; those below stay as they are, and what they "
                           "give is computed once for policy and reference", least=0)
    train: str = opt("decoder", "what every training moves: decoder: its projections; mlp: gate, up and down alone; "
                     "all: vision tower, embeddings, head and norms too", among=("decoder", "mlp", "all"))
    lora_rank: int = opt(0, "rank R of a change B A of each of these matrices, trained in their place and merged at "
                         "the end; it wants a larger learning rate; 0: none", least=0)
    shard: bool = opt(False, "stage 2: of the decoder, its gradients and AdamW's states each process of torchrun "
                             "holds a part")
    state_dtype: str = opt("float32", "AdamW's moments: float32 or, in half the memory, bfloat16",
                           among=("float32", "bfloat16"))
    memorise: bool = opt(False, "stage 0, before everything: teach the model forget and retain; writes vanilla/")
    memorise_lr: float = opt(1e-4, "stage 0: learning rate of AdamW; it falls to 0 in a line", above=0)
    memorise_epochs: int = opt(5, "stage 0: passes over both files", least=1)

    method: str = opt("asru", "asru-paper: without what we added, at the scale (lr, steps, layer, strength ...) of the "
                      "model's asru.json, as the paper's lr does nothing to a small model; steer, rl: one stage; ga, "
                      "ga_diff, kl_min, npo, idk, mmunlearner", among=("asru", "asru-paper", "steer", "rl", *BASELINES))
    paper_table: bool = opt(False, "reward: the paper's table as it is printed, and no term of ours")
    random_boundary: bool = opt(False, "draw the boundary set at random, not by nearness")
    baseline_lr: float = opt(5e-5, "baseline: learning rate of Adam", above=0)
    baseline_epochs: int = opt(4, "baseline: passes over the forget file, at most", least=1)
    baseline_batch: int = opt(4, "baseline: forget prompts per step, and as many retain prompts", least=1)
    beta: float = opt(0.4, "baseline: beta of npo", above=0)
    stop: str = opt("utility", "baseline: utility: the last check with retain recall 0.95 of before; forgetting: the "
                    "first with forget recall at most 0.05", among=("utility", "forgetting"))
    compare: bool = opt(False, "run every method over several seeds, print the table, write compare.json alone")
    seeds: int = opt(5, "compare: number of seeds, from --seed on", least=1)
    attacks: bool = opt(False, "compare: at the first seed, attack what each run but those at equal utility leaves")
    sweep: bool = opt(False, "print what stage 1 does at every layer and several lambda or, with a baseline's --method, "
                             "what that does at several learning rates; nothing is written")


def asru(model, proc, data, cfg, log, shared=None):
    """The whole method at a glance: measure, redirect, measure, sharpen, measure.

    data: samples of "forget", "retain", "target", "test". log: takes a dict per report, for log.jsonl. shared: what
    `get_ready` gave, if at hand.
    Returns {stage: {set: (metrics, responses)}}, stages before, steered, after. Changes the model in place.
    """
    prompts, measure, before = shared or get_ready(model, proc, data, cfg)
    results = {"before": before}

    forget, retain, target = (prompts[name] for name in ("forget", "retain", "target"))
    layer = chosen_layer(model, cfg)
    said = respond(model, proc, target, cfg.max_new_tokens, cfg.eval_batch)
    target = target.take([i for i, text in enumerate(said) if is_refusal(text)])     # knowledge is absent
    if not len(target):
        raise ValueError("the model refuses no question of the target file; there is nothing to steer towards")
    boundary = retain.take(select_boundary(model, forget, retain, layer, cfg))
    seen = seen_in(model, proc, forget, boundary, cfg)
    results["steered"], unsteered = results["before"], None
    if not cfg.skip_steer:
        base, unsteered = checksum(model), (layer, down_proj_of(model, layer).detach().clone())
        edit, moved = redirect(model, proc, forget, boundary, target, layer, cfg, seen)
        log({"stage": 1, **moved})
        save_steer(edit, base, layer, cfg)
        results["steered"] = measure("steered")
    results["after"] = results["steered"]
    if not cfg.skip_rl:
        optimize_boundary(model, proc, forget, boundary + seen, target, cfg, log, unsteered)
        results["after"] = measure("after")
    return results


# ------------------------------------------------------------------------------ stage 1: activation redirection
#
#   h(x)   residual stream after layer L at the last prompt token;  k  inputs of layer L's down_proj
#   v    = mean h over target - mean h over forget                      from "I know" to "I can't tell"
#          with --each v(f) = mean h over target - h(f): all of what tells one fact from another goes, not their mean alone
#   dW   = argmin  mean_f |dW k_f - lambda v|^2 + w mean_r |dW k_r|^2 + mean_t |dW k_t|^2 + gamma |dW|^2
#          f, r, t  last token of a forget, a boundary, a target prompt, r a sum for each kind (private, visible, general);
#                   w  --weight-retain: the farther f is to move, the more it takes to hold r, whose keys are like f's
#          r, t  also tokens inside their answers, and inside refusals of f, sums of their own: once an answer has begun,
#             nothing moves; with --hold-visible one more r, of answers to what anyone can see in the pictures to forget
#   With --begun also f and r of prompts whose answer has begun: their last token is the one before the key fact, and
#   their v = mean h over those of boundary whose answers begin alike - mean h over these of forget     from this person's
#   fact to nobody's, their lambda --strength-begun times as large: which fact is the likelier one is decided here
#   dW^T = (K^T K + gamma I)^-1 K^T T = K^T (K K^T + gamma I)^-1 T      K, T: rows k and what is asked of them


@torch.no_grad()
def redirect(model, proc, forget, boundary, target, layer, cfg, seen=None):
    """Stage 1: change layers[layer].mlp.down_proj in place. Returns what it changed and what moved how far, in units of |v|.

    forget, boundary, target, seen: Prompts; of seen (`seen_in`) what lies inside the answers is held.
    Changed: "dW" (D, F) and the mean v (D,) of each place and way of asking, "v_picture", "v_words", "v_begun_picture",
    "v_begun_words".
    """
    opening = lambda prompts: opened(proc, prompts) if cfg.begun else prompts.take([])
    parts = {"forget": answered_by_refusals(forget, target, random.Random(cfg.seed)), "forget_begun": opening(forget),
             "retain": boundary, "retain_begun": opening(boundary), "target": target, "seen": seen or forget.take([])}
    asked = sum(parts.values(), forget.take([]))
    keys, resid, inside = collect_activations(model, asked, layer, cfg, proc)       # (n, F), (n, D), n times (n_a, F)
    number = iter(range(len(asked)))
    rows = {name: [next(number) for _ in part.samples] for name, part in parts.items()}
    within = lambda rows: torch.cat([keys[:0], *(inside[i] for i in rows)])
    answers = [within(rows["seen"]), within(rows["forget"]), *map(within, by_kind(asked, rows["retain"]))]
    places, moves, held, edit = [], [], [], {}
    for place, strength in (("", cfg.strength), ("_begun", cfg.strength * cfg.strength_begun)):
        f, r = rows["forget" + place], rows["retain" + place]
        if not f:
            continue
        others = r if place and r else rows["target"]       # where everybody's fact comes next, their mean is nobody's
        samples_f, samples_o = ([asked.samples[i] for i in some] for some in (f, others))
        direction, means = steering_vectors(samples_f, resid[f], samples_o, resid[others], cfg.each)
        places.append((place, strength))
        moves.append((keys[f], direction))                                  # (n_f, F), (n_f, D)
        held.append([keys[kind] for kind in by_kind(asked, r)])             # (n_r, F) each
        edit |= {f"v{place}{way}": v for way, v in means.items()}
    shifts = [(keys, strength * direction) for (_, strength), (keys, direction) in zip(places, moves)]
    kept = [cfg.weight_retain**0.5 * keys for keys in chain(*held, answers)]        # to give 0: this weighs them
    update = solve_redirection(shifts, [*kept, keys[rows["target"]], within(rows["target"])], cfg.ridge)    # (D, F)
    weight = down_proj_of(model, layer)
    weight += update.to(weight.dtype)

    moved = {}
    for (place, _), (keys_f, direction), keys_r in zip(places, moves, map(torch.cat, held)):
        length = direction.norm(dim=1)                                      # (n_f,) |v|
        moved_f, moved_r = keys_f @ update.T, keys_r @ update.T             # (n_f, D), (n_r, D)
        moved |= {f"direction_norm{place}": length.mean().item(),
                  f"forget_moved_along_v{place}": ((moved_f * direction).sum(1) / length**2).mean().item(),
                  f"retain_moved{place}": (moved_r.norm(dim=1).sum() / max(1, len(keys_r)) / length.mean()).item()}
    return {"dW": update, **edit}, {
        "layer": layer, "strength": cfg.strength, "forget": len(forget), "boundary": len(boundary),
        "target": len(target), **moved, "update_norm": update.norm().item(), "weight_norm": weight.double().norm().item()}


def by_kind(prompts, rows):
    """These rows, a list per kind of sample: private questions, the most, are not to outweigh what all may know."""
    kinds = {}
    for i in rows:
        kinds.setdefault(prompts.samples[i].get("kind"), []).append(i)
    return list(kinds.values()) or [[]]


def chosen_layer(model, cfg):
    """L of --layer, or the paper's share of the depth (17 of 36). Raises ValueError for layers that are not there."""
    depth = model.cfg.text.num_hidden_layers
    for name, index in (("layer", cfg.layer), ("first layer", cfg.first_layer)):
        if index is not None and index >= depth:
            raise ValueError(f"{name} {index} does not exist: the model has {depth} layers, 0..{depth - 1}")
    return cfg.layer if cfg.layer is not None else 17 * depth // 36


@torch.no_grad()
def collect_activations(model, prompts, layer, cfg, proc=None):
    """At the last prompt token of a layer: down_proj's input (n, F) and the residual stream (n, D), float64.

    And down_proj's input at the first `hold` tokens of the own answer of each, n times (n_a, F); without proc at none, nor of
    an answer that has begun.
    """
    F, D = model.cfg.text.intermediate_size, model.cfg.text.hidden_size
    keys, resid = ([torch.empty(0, n, dtype=torch.double, device=model.device)] for n in (F, D))
    inside, order = [], in_order(prompts)
    for rows in chunks(order, cfg.eval_batch):
        said = proc.plain([prompts.samples[i]["answer"] for i in rows]) if proc else [[]] * len(rows)
        answers = [[] if "begun" in prompts.samples[i] else answer[:cfg.hold] for i, answer in zip(rows, said)]
        asked = prompts.take(rows)
        asked = replace(asked, tokens=[torch.cat([row, row.new_tensor(answer)]) for row, answer in zip(asked.tokens, answers)])
        batch, size = asked.batch(range(len(rows)), "cpu"), torch.tensor([1 + len(answer) for answer in answers])       # (B,)
        T = batch.input_ids.shape[1]
        batch = model.packed(batch, torch.arange(T) >= T - size[:, None]).to(model.device)
        last = sent(size.cumsum(0) - size, model.device)                    # (B,) among those asked for

        def record(value, site, index):
            if index == layer:          # of all tokens, (1, N, ...), or of those alone that are asked for
                wanted = value[0] if value.shape[1] == len(batch.packing.wanted) else value[0, batch.packing.wanted]
                (keys if site == "mlp_inner" else resid).append(wanted[last].double())
                if site == "mlp_inner":
                    inside.extend(part[1:] for part in wanted.double().split(size.tolist()))
            return value

        model(batch, hook=record, stop=layer + 1)
    back = torch.tensor(order, dtype=torch.long).argsort()
    return *(torch.cat(found)[back.to(model.device)] for found in (keys, resid)), [inside[i] for i in back.tolist()]


def seen_in(model, proc, forget, boundary, cfg):
    """With --hold-visible: the boundary set's visible questions, asked of the forget set's pictures in turn, as Prompts.

    The answers are the model's own, said before anything is changed: nobody has to write them. The fact, another's, is gone.
    """
    pictures = list(dict.fromkeys(s["image"] for s in forget.samples if s.get("image")))
    visible = [s for s in boundary.samples if s.get("kind") == "visible" and s.get("image")]
    if not (cfg.hold_visible and pictures and visible):
        return forget.take([])
    asked = encode(model, proc, [{**s, "image": image} for s, image in zip(visible, cycle(pictures))], forget.pictures)
    said = respond(model, proc, asked, cfg.max_new_tokens, cfg.eval_batch)
    return replace(asked, samples=[{k: v for k, v in {**s, "answer": text}.items() if k != "fact"}
                                   for s, text in zip(asked.samples, said)])


def answered_by_refusals(forget, target, rng):
    """The forget prompts, each answered as one of the target questions most like it is, asked the same way if any is; a
    stranger's name in it gives way to the name that was asked about. Where no target question is refused, answered by ""."""
    words = lambda s: frozenset(content_words(s["question"]) - content_words(" ".join(names_in(s["question"]))))
    pool, answered = [(t, words(t)) for t in target.samples if is_refusal(t["answer"])], []

    @cache
    def nearest(asked, pictured):       # many ask about their person in the same words
        likeness = [(bool(t.get("image")) == pictured, len(asked & w) / max(1, len(asked | w))) for t, w in pool]
        most = max(likeness, default=None)
        return [t for (t, _), like in zip(pool, likeness) if like == most] or [{"question": "", "answer": ""}]

    for s in forget.samples:
        t = rng.choice(nearest(words(s), bool(s.get("image"))))
        mine, other = names_in(s["question"]), names_in(t["question"])
        answered.append({**s, "answer": t["answer"].replace(other[0], mine[0]) if mine and other else t["answer"]})
    return replace(forget, samples=answered)


def steering_vectors(forget, resid_f, others, resid_o, each):
    """v of every forget sample, (n_f, D), and {"_picture", "_words": its mean (D,) over that way of asking}.

    v goes from where the residual stream is, resid_f (n_f, D), to where that of others, resid_o (n_o, D), is on average:
    of those that are asked in the same way and whose answer, if it has begun, ends in the same two words; where there are
    none, of those asked in the same way, or of all. each: from where the prompt is, not from the mean.
    """
    end_of = lambda s: (bool(s.get("image")), tuple(s.get("begun", "").split()[-2:]))
    ends = [end_of(s) for s in others]

    def goal(end):
        alike = [i for i, e in enumerate(ends) if e == end] or [i for i, e in enumerate(ends) if e[0] == end[0]]
        return (resid_o[alike] if alike else resid_o).mean(0)               # (D,)

    goals = {end: goal(end) for end in {end_of(s) for s in forget}}
    direction, means = torch.stack([goals[end_of(s)] for s in forget]) - resid_f, {}       # (n_f, D)
    for pictured, name in ((True, "_picture"), (False, "_words")):
        mine = torch.tensor([bool(s.get("image")) == pictured for s in forget])
        if mine.any():
            means[name] = direction[mine].mean(0)
            direction[mine] = direction[mine] if each else means[name]
    return direction, means


def solve_redirection(moves, held, ridge):
    """The smallest change of a matrix that moves keys as asked and leaves all held keys alone: (D, F).

    moves: list of (keys (n, F), shift (n, D)), held: list of (n, F), all float64. Every group of keys counts as much as
    any other, however many it has. gamma = ridge * the sum of all |k|^2 so weighted: `ridge` means the same for every
    layer and model. Solves the smaller of the two systems, n x n or F x F. Raises ValueError on unlike shapes.
    """
    asked = [(keys, shift) for keys, shift in moves if len(keys)]
    groups = [*(keys for keys, _ in asked), *(keys for keys in held if len(keys))]
    if len({keys.shape[1] for keys in groups}) != 1 or any(len(keys) != len(shift) for keys, shift in asked):
        shapes = [list(x.shape) for x in (*(x for pair in moves for x in pair), *held)]
        raise ValueError(f"keys, their shifts and held keys do not fit each other: {shapes}")
    n, width = sum(map(len, groups)), groups[0].shape[1]
    gamma = ridge * sum(keys.square().sum() / len(keys) for keys in groups)
    system = lambda gram: gram + gamma * torch.eye(len(gram)).to(gram)
    if n > width:
        gram = sum(keys.T @ keys / len(keys) for keys in groups)            # K^T K (F, F), and K is never made
        return torch.linalg.solve(system(gram), sum(keys.T @ shift / len(keys) for keys, shift in asked)).T
    K = torch.cat([keys / len(keys)**0.5 for keys in groups])               # (n, F)
    shift = torch.cat([shift / len(shift)**0.5 for _, shift in asked])
    T = torch.nn.functional.pad(shift, (0, 0, 0, n - len(shift)))           # (n, D)
    return torch.linalg.solve(system(K @ K.T), T).T @ K


def select_boundary(model, forget, retain, layer, cfg):
    """Indices of the retain samples nearest to the forget set at a layer: a share of each kind, not of people.

    Every forget prompt gets its nearest neighbour, then its second, until the share is full: were it the largest
    cosines, a few wordings whose residual streams lie close together would fill it. Cosines are of residual streams
    less the retain mean, which all share. Each kind (private, visible, general) fills its own share: together, private
    questions would take it all.
    """
    if cfg.boundary == 1:
        return list(range(len(retain)))
    resid_f, resid_r = (collect_activations(model, prompts, layer, cfg)[1] for prompts in (forget, retain))
    unit = lambda h: torch.nn.functional.normalize(h - resid_r.mean(0), dim=1)
    cosine = unit(resid_f) @ unit(resid_r).T                                # (n_f, n_r)
    kinds, chosen = [s.get("kind") for s in retain.samples], []
    for kind in dict.fromkeys(kinds):
        rows = torch.tensor([i for i, k in enumerate(kinds) if k == kind], device=cosine.device)    # (n,) of this kind
        near = cosine[:, rows]                                              # (n_f, n)
        rank = near.argsort(1, descending=True).argsort(1).amin(0)          # (n,) best place in any forget row
        nearness = near.amax(0) - 3 * rank                                  # by rank, then by cosine, which is in -1..1
        chosen += rows[nearness.topk(max(1, round(cfg.boundary * len(rows)))).indices].tolist()
    return sorted(chosen)


# ------------------------------------------------------------------------------ stage 2: refusal boundary by GRPO
#
#   A_i     = (r_i - mean r) / (std r + 1e-6)                   over the G responses of a prompt, std with n - 1;
#             with --all-wrong  - all_wrong  where a forget prompt's best r is no more than 0.1
#   rho     = p(token) / p_old(token)
#   q       = log p_ref(token) - log p(token)
#   L       = - mean over tokens of  min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta (exp(q) - q - 1)
#             beta: --kl, on forget prompts --kl-forget times that; p_ref: of the model after stage 1, with --kl-before
#             on all but forget prompts of the one before it; one pass makes both, adding stage 1's change on forget prompts
#   p, p_old and p_ref are the distribution that was sampled from: temperature, top-p, no vision tokens.


def optimize_boundary(model, proc, forget, boundary, target, cfg, log, unsteered=None):
    """Stage 2: GRPO on forget, boundary and unseen-people prompts; changes what `trainable` chooses in place.

    Embeddings, head and norms stay, but for --train all: each of their numbers serves every prompt, and training
    them moved what was to be kept. unsteered: (layer, its down_proj (D, F) before stage 1), if that was made.
    """
    if cfg.begun:
        forget, boundary = (prompts + opened(proc, prompts) for prompts in (forget, boundary))
    pool = forget + boundary + target
    roles = ["forget"] * len(forget) + ["retain"] * len(boundary) + ["target"] * len(target)
    of_role = lambda forget, other: [forget if role == "forget" else other for role in roles]
    beta, push = torch.tensor(of_role(cfg.kl * cfg.kl_forget, cfg.kl)), torch.tensor(of_role(cfg.all_wrong, 0.0))   # of the pool
    model.text.recompute = cfg.recompute
    trained = trainable(model, cfg, cfg.first_layer)
    reference, steered = frozen_copy(model) if cfg.kl else None, None
    if cfg.kl and cfg.kl_before and unsteered:
        steered = Steered(unsteered[0], take_back(reference, *unsteered), torch.tensor(of_role(True, False)))
    if cfg.shard:
        trained = shard(model, reference)
    exact = exactly(trained)            # what the optimizer moves
    optimizer = optimizer_of(exact, cfg.lr, cfg.weight_decay, cfg)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, cfg.lr_end, max(1, cfg.steps))
    reward = reward_of(cfg)
    rng, generator = random.Random(cfg.seed), torch.Generator(model.device).manual_seed(cfg.seed)
    mean = [p.detach().clone() for p in exact] if cfg.average else []
    resting = set()                     # prompts whose last group was silent: all responses were worth the same
    stream = draw_prompts(pool, roles, cfg, rng, resting)
    bar = tqdm(range(1, cfg.steps + 1), desc="stage 2", unit="step", dynamic_ncols=True)
    for step in survive(bar, log, stream, optimizer, trained, mean, resting, schedule, generator):
        started = time.perf_counter()
        rows, twins = next(stream)

        # 1 Sample G responses to each of Q prompts: tokens (Q, G, C), kept up to and including the end token.
        said = sample_groups(model, pool, rows, cfg, generator)

        # 2 Reward them.
        begun = [pool.samples[i].get("begun", "") for i in rows for _ in range(cfg.group)]
        texts = list(chunks(proc.decode(said.tokens.flatten(0, 1), begun), cfg.group))
        rewards, terms = reward(texts, [pool.samples[i] for i in rows], [roles[i] for i in rows], twins)
        rewards = torch.tensor(rewards)                                     # (Q, G)

        # 3 Compare within the group; a group of equal rewards says nothing and is left out.
        advantage = group_advantage(rewards, push[rows])                    # (Q, G)
        live = advantage.any(1).nonzero()[:, 0].tolist()
        resting.update(rows)
        resting.difference_update(rows[q] for q in live)

        # 4 and 5 Log-probabilities of policy and reference; clipped updates.
        try:
            stats = update(model, reference, optimizer, trained, pool, said, advantage, live, cfg, beta[rows],
                           steered and steered.of(rows))
        except FloatingPointError as error:
            ids = " ".join(str(pool.samples[rows[q]].get("id", rows[q])) for q in live)
            raise FloatingPointError(f"stage 2, step {step}: {error}; prompts {ids}") from None
        schedule.step()
        accumulate_mean(mean, exact, cfg.average, step)

        seconds = time.perf_counter() - started
        kinds = [kind_of(pool.samples[i], roles[i]) for i in rows]
        line = {"stage": 2, "step": step, **step_report(texts, rewards, kinds, terms, said.keep),
                "live_groups": len(live) / len(rows), **stats, "tokens_per_s": int(said.keep.sum()) / seconds}
        log(line)
        shown = ("reward", "refuse_forget", "refuse_retain", "kl")
        bar.set_postfix({name: f"{line[name]:.2f}" for name in shown if name in line})
    for p, kept in zip(trained, mean):
        p.detach().copy_(kept)
    merge(model)
    if cfg.shard:
        unshard(model)
    model.requires_grad_(True)


def down_proj_of(model, layer):
    return model.text.layers[layer].mlp.down_proj.weight


class Rollout(NamedTuple):
    """G responses to each of Q prompts, on the CPU."""
    rows: list                      # (Q,) which prompts of the pool
    tokens: torch.Tensor            # (Q, G, C)
    keep: torch.Tensor              # (Q, G, C) bool, true up to and including the end token
    logp: torch.Tensor              # (Q, G, C) log-probability of each token when it was drawn, in nats


@torch.no_grad()
def sample_groups(model, pool, rows, cfg, generator):
    """A Rollout of these prompts of the pool."""
    shape = len(rows), cfg.group, cfg.max_new_tokens
    chance = torch.rand(shape, dtype=torch.float64, generator=generator, device=model.device)

    def sample(part):
        batch, logp = pool.batch([rows[q] for q in part], model.device), torch.zeros_like(chance[part], dtype=torch.float32)
        tokens = model.generate(batch, cfg.max_new_tokens, cfg.group, cfg.temperature, cfg.top_p, chance=chance[part],
                                logp=logp)
        return tokens.view(len(part), cfg.group, -1).cpu(), logp.cpu()

    with gathered(model):
        said, logp = zip(*in_turn(sample, chunks(range(len(rows)), -(-len(rows) // world()[1]))))
    longest = max(part.shape[2] for part in said)
    tokens = torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[2]), value=model.cfg.pad_token_id)
                        for part in said])                                  # (Q, G, C)
    ended = torch.isin(tokens, torch.tensor(model.cfg.eos_token_ids)).long()
    keep = ended.cumsum(-1) - ended == 0                                    # nothing has ended before this token
    return Rollout(rows, tokens, keep, torch.cat(logp)[..., :longest])


def group_advantage(reward, push=None, eps=1e-6):
    """(Q, G) -> (Q, G): how much better than its group, in the group's standard deviations (n - 1); 0 among equals.

    push: (Q,), where it is above 0 and nothing in the group is right (no reward above WRONG), all of it gets -push. For
    prompts with many right answers: where one alone is right, who leaves the wrong ones ends up anywhere.
    """
    advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + eps)
    advantage[reward.amax(1) == reward.amin(1)] = 0.0       # however the mean of equals is rounded
    if push is not None:
        lost = (reward.amax(1) <= WRONG) & (push > 0)
        advantage[lost] = -push[lost, None]
    return advantage


WRONG = 0.1         # the most that the table gives for what is plainly wrong


def clipped_surrogate(logp, logp_old, advantage, eps):
    """min(rho A, clip(rho) A) per token; all (n,)."""
    ratio = (logp - logp_old).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - eps, 1 + eps) * advantage)


def k3(logp, logp_ref):
    """Estimate of KL(p || p_ref) per token, in nats, never negative: exp(q) - q - 1 with q = log p_ref - log p."""
    q = logp_ref - logp
    return q.exp() - q - 1


def update(model, reference, optimizer, trained, pool, said, advantage, live, cfg, beta=None, steered=None):
    """One optimizer step per minibatch of live groups. Returns mean loss, KL, clipped share and gradient norm.

    said: a Rollout; reference: a model or None, no KL; advantage: (Q, G); live: places in it of the groups that say
    something; beta: (Q,), or cfg.kl for all; steered: Steered of Q prompts, or None.
    """
    rows, tokens, keep, logp_old = said
    beta = torch.full((len(rows),), cfg.kl) if beta is None else beta
    if not advantage.isfinite().all():
        raise FloatingPointError("a reward is no number, and no step was made")
    args = lambda part: (pool.batch([rows[q] for q in part], "cpu"), tokens[part], keep[part])
    length = [len(pool.tokens[row]) + n for row, n in zip(rows, keep.sum((1, 2)).tolist())]     # prompt and responses
    deal = -(-len(rows) // cfg.minibatch)           # minibatches, dealt out in turn: each has prompts of every role
    minibatches = [(mini, sorted((q for q in mini if q in live), key=length.__getitem__))   # like lengths: less padding
                   for mini in (list(range(i, len(rows), deal)) for i in range(deal))]
    minibatches = [(mini, heard) for mini, heard in minibatches if heard]

    def shares(heard):
        """[(microbatch, weight)]. All processes must call a sharded model as often: what lacks is done for nothing."""
        number = -(-len(heard) // cfg.microbatch)
        parts = [(heard[len(heard) * i // number:len(heard) * (i + 1) // number], 1.0) for i in range(number)]   # alike in size
        return parts + [(parts[0][0], 0.0)] * (-len(parts) % world()[1] if cfg.shard else 0)

    def learn(share):
        part, weight = share
        logp, logp_ref = response_logp(model, reference, *args(part), cfg, steered and steered.of(part))    # (n,) n kept tokens
        logp_then, A, weight_kl = (sent(x[keep[part]], model.device) for x in (                 # (n,)
            logp_old[part], *(y.expand(keep[part].shape) for y in (advantage[part][:, :, None], beta[part][:, None, None]))))
        logp_then = logp_then if stepped else logp.detach()                         # before a step they are the same
        kl = k3(logp, logp_ref) if reference is not None else torch.zeros_like(logp)
        loss = (weight_kl * kl - clipped_surrogate(logp, logp_then, A, cfg.clip)).sum() / count
        (weight * loss).backward()
        clipped = ((logp.detach() - logp_then).exp() - 1).abs() > cfg.clip
        seen.append(weight * torch.stack([loss.detach(), kl.detach().sum() / count, clipped.sum() / count]).double())

    figures = np.zeros(4)
    for stepped, (mini, heard) in enumerate(minibatches):
        count = keep[mini].sum().item()     # of the whole minibatch, silent groups too: as fewer speak, steps get smaller
        seen = [torch.zeros(3, dtype=torch.double, device=model.device)]    # looked at when all is on its way: no GPU waits
        in_turn(learn, shares(heard))
        loss, kl, clipped = np.sum(in_turn(lambda _: sum(seen).tolist(), range(world()[1])), axis=0)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}, no step was made; a lower learning rate is needed")
        if not cfg.shard:
            add_up_gradients(trained)
        norm = optimizer_step(optimizer, trained, cfg.grad_norm)
        figures += np.array([loss, kl, clipped, norm]) / len(minibatches)
    return dict(zip(("loss", "kl", "clipped", "grad_norm"), figures.tolist()))


@torch.no_grad()
def optimizer_step(optimizer, trained, limit):
    """Clip the gradient, step, clear. Returns its norm before.

    What the optimizer moves is float32: the trained weights themselves or, where they are bfloat16, the numbers that
    they are rounded from. A step of 1e-6 is far below the last digit of a bfloat16 weight and would be lost each time.
    Of few of them at a time there is a float32 gradient.
    """
    norm = whole(torch.nn.utils.clip_grad_norm_(trained, limit)).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm}, and no step was made; a lower learning rate is needed")
    for part in chunks([*zip(optimizer.param_groups[0]["params"], trained, [p.grad for p in trained])], TOGETHER):
        optimizer.zero_grad()
        for e, p, gradient in part:
            p.grad = None
            e.grad = gradient if gradient is None else gradient.to(e.dtype)
        optimizer.step()
        for e, p, _ in part:
            if e is not p:
                p.copy_(e)
    optimizer.zero_grad()
    return norm


TOGETHER = 16       # matrices that the optimizer moves at a time


@torch.no_grad()
def accumulate_mean(mean, trained, decay, step):
    """Running mean of the weights after a step, in place: of all steps so far at first, then exponential by `decay`.

    Single steps of a policy gradient wander: which prompts of either side a step's weights get wrong is chance. Their
    mean gets fewer wrong than any one of them.
    """
    for kept, p in zip(mean, trained):
        kept.lerp_(p, max(1 / step, 1 - decay))


def response_logp(model, reference, batch, tokens, keep, cfg, steered=None):
    """Log-probabilities of the kept response tokens under policy and reference, each (n,), in nats.

    Both are of the distribution that `generate` samples from; the reference is cut to the policy's nucleus, so
    that their KL is one between two distributions over the same tokens. The head works in chunks, whose logits
    are made again in backward: no (m, V) tensor outlives its chunk. What several responses begin with alike is
    computed once, and its gradient is the sum of theirs. steered: Steered of the rows of the batch, or None.
    """
    leader, node, _ = tree_of(tokens, keep)
    number = (node.flatten().long().cumsum(0) - 1).view_as(node)            # (B, G, C)
    if steered is not None:
        batch = replace(batch, apart=steered.prompts.long())
    tree, place = model.tree(batch, tokens, keep)
    shared, start, inner = 0 if reference is None else layers_shared(model, reference), None, None

    def record(value, site, layer):
        nonlocal start
        if (site, layer) == ("resid", shared - 1):      # the reference would make the same once more
            start = shared, value
        return value

    def steer(value, site, layer):
        nonlocal inner
        if steered is None or layer != steered.layer:
            return value
        if site == "mlp_inner":
            inner = value                                                   # (1, N or M, F)
            return value
        slot = tree.packing.pack[0]                                         # (N,) in (B * W)
        slot = slot if value.shape[1] == len(slot) else slot[tree.packing.wanted]
        mine = sent(steered.prompts, model.device)[slot // tree.segments.shape[1]]          # (N or M,)
        return value + mine[:, None] * (inner @ steered.dW.T)

    of_token, chosen, place = (sent(x, model.device) for x in (             # (n,), (m,), (m,) m nodes
        number.gather(1, leader)[keep], tokens[node], place[node]))
    hidden = model(tree, record)[0, place]                                  # (m, D)
    with torch.no_grad():
        hidden_ref = hidden if reference is None else reference(tree, steer, start=start)[0, place]

    def head(m, hidden, chosen, **nucleus):
        return m.distribution(hidden, cfg.temperature, **nucleus).gather(1, chosen[:, None])[:, 0]      # of (m, V)

    def support(hidden, chosen):
        return model.distribution(hidden, cfg.temperature, cfg.top_p, include=chosen) > -torch.inf if cfg.top_p < 1 else None

    size = max(1, HEAD_CHUNK // model.cfg.text.vocab_size)
    parts = list(zip(hidden.split(size), hidden_ref.split(size), chosen.split(size)))
    again = partial(checkpoint, head, use_reentrant=False, preserve_rng_state=False) if len(parts) > 1 else head
    logp = torch.cat([again(model, h, c, top_p=cfg.top_p, include=c) for h, _, c in parts])             # (m,)
    with torch.no_grad():
        logp_ref = logp.detach() if reference is None else torch.cat(
            [head(reference, h_ref, c, support=support(h, c)) for h, h_ref, c in parts])
    return logp[of_token], logp_ref[of_token]


HEAD_CHUNK = 2**25      # logits made at a time


def frozen_copy(model):
    """The same model, frozen; only what is trained is copied."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False)


def layers_shared(model, reference):
    """How many of the decoder's layers, from the first on, are the same in memory; the last is not counted."""
    same = [all(p is q for p, q in zip(a.parameters(), b.parameters())) for a, b in zip(model.text.layers, reference.text.layers)]
    return [*same[:-1], False].index(False)


class Steered(NamedTuple):
    """Where the reference is the model before stage 1: what stage 1 changed, and the prompts for which it has that too."""
    layer: int
    dW: torch.Tensor                # (D, F) of that layer's down_proj
    prompts: torch.Tensor           # (n,) bool

    def of(self, rows):
        return self._replace(prompts=self.prompts[rows])


@torch.no_grad()
def take_back(reference, layer, weight):
    """Give the reference that layer's down_proj (D, F) of before stage 1. Returns what stage 1 had changed, (D, F)."""
    change = down_proj_of(reference, layer) - weight
    reference.text.layers[layer].mlp.down_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    return change


def draw_prompts(pool, roles, cfg, rng, resting):
    """Endless steps of Q prompts: (indices into the pool, twin of each as a place in that list or None).

    A unit is one fact of one person, asked with the picture and in words alone where both exist: these are twins.
    Prompts that rest are passed over for others of their unit; a unit that rests as a whole is left out with
    probability `rest`, and seen again often enough to be caught when it changes.
    """
    units = {}
    for i, (s, role) in enumerate(zip(pool.samples, roles)):
        key = (s["person"], s["fact"]) if s.get("person") and s.get("fact") else i
        units.setdefault(kind_of(s, role), {}).setdefault(key, ([], []))[bool(s.get("image"))].append(i)
    num_f, num_r = round(cfg.mix_forget * cfg.prompts), round(cfg.mix_retain * cfg.prompts)
    begun_f, begun_r = round(cfg.begun * num_f), round(cfg.begun * num_r)
    quota = {"forget": num_f - begun_f, "forget_begun": begun_f, "retain": num_r - begun_r, "retain_begun": begun_r,
             "target": cfg.prompts - num_f - num_r}
    streams = {role: shuffled_forever(list(found.values()), rng) for role, found in units.items() if found}
    while True:
        rows, twins = [], []
        for role, number in quota.items():
            stop = len(rows) + number
            while role in streams and len(rows) < stop:
                unit = next(streams[role])
                while resting.issuperset(i for way in unit for i in way) and rng.random() < cfg.rest:
                    unit = next(streams[role])
                awake = [[i for i in way if i not in resting] or way for way in unit if way]
                pair = [rng.choice(way) for way in awake][:stop - len(rows)]
                twins += [len(rows) + 1, len(rows)] if len(pair) == 2 else [None]
                rows += pair
        yield rows, twins


def kind_of(sample, role):
    return role + "_begun" * ("begun" in sample)


def shuffled_forever(items, rng):
    while True:
        yield from rng.sample(items, len(items))


def step_report(texts, rewards, roles, terms, keep):
    """What a person watches during stage 2, from one step's rollouts."""
    refused = {}
    for group, role in zip(texts, roles):
        refused.setdefault(role, []).extend(map(is_refusal, group))
    return {"reward": rewards.mean().item(), **{f"reward_{name}": value for name, value in terms.items()},
            **{f"refuse_{role}": sum(found) / len(found) for role, found in sorted(refused.items())},
            "response_tokens": keep.sum().item() / keep[..., 0].numel()}


# ------------------------------------------------------------------------------ other methods
#
#   l(x)         mean log p(token) over an answer's tokens, its end among them;  CE = - mean of l;  s(x) their sum
#   ga           - CE(D_f)
#   ga_diff      - CE(D_f) + CE(D_r)
#   kl_min       - CE(D_f) + mean over answer tokens of D_r of KL(p_0 || p)
#   npo          - 2 / beta  mean over D_f of  log sigmoid(-beta (s - s_0))           ga's gradient as beta -> 0
#   idk          CE(D_f answered by refusals) + CE(D_r)
#   mmunlearner  ga_diff, on those weights alone that matter more to D_f than to D_r
#   p_0, s_0: of the model before


PRESETS = {     # what --method sets; a flag beats it
    "asru-paper": dict(each=False, weight_retain=1.0, hold_visible=False, hold=0, begun=0.0, all_wrong=0.0, rest=0.0,
                       average=0.0, kl_forget=1.0, kl_before=False, lr_end=1.0, first_layer=0, consistency=0.0,
                       rigidity=0.0, mix_forget=0.5, mix_retain=0.5, paper_table=True),
    "steer": dict(skip_rl=True),
    "rl": dict(skip_steer=True)}


def unlearn(model, proc, data, cfg, log, shared=None):
    """--method, whichever it is; as `asru`."""
    if cfg.method not in BASELINES and not cfg.random_boundary:
        return asru(model, proc, data, cfg, log, shared)
    prompts, measure, before = shared or get_ready(model, proc, data, cfg)
    if cfg.random_boundary:
        retain, rng = prompts["retain"], random.Random(cfg.seed)
        drawn = retain.take(rng.sample(range(len(retain)), max(1, round(cfg.boundary * len(retain)))))
        return asru(model, proc, data, replace(cfg, boundary=1.0), log, ({**prompts, "retain": drawn}, measure, before))
    descend(model, proc, prompts, cfg, log)
    return {"before": before, "steered": before, "after": measure("after")}


def descend(model, proc, prompts, cfg, log):
    """Train a baseline: Adam on what stage 2 trains, D_f pass by pass, as many prompts of the whole D_r beside it.

    Every CHECK steps greedy answers to a fixed part of both files decide; the weights that were kept last stay.
    """
    forget, retain, rng = prompts["forget"], prompts["retain"], random.Random(cfg.seed)
    trained = trainable(model, cfg)
    optimizer, reference = optimizer_of(exactly(trained), cfg.baseline_lr, 0.0, cfg), frozen_copy(model)
    masks = saliency_masks(model, proc, forget, retain, trained, cfg, rng) if cfg.method == "mmunlearner" else []
    taught = answered_by_refusals(forget, prompts["target"], rng) if cfg.method == "idk" else forget
    if not any(s["answer"] for s in taught.samples):
        raise ValueError("no answer in the target file is a refusal; idk has nothing to teach")
    pools = [(pool, shuffled_forever(range(len(pool)), rng)) for pool in (taught, retain)]
    batches = iter(lambda: [pool.take([next(stream) for _ in range(cfg.baseline_batch)]) for pool, stream in pools],
                   None)
    parts = probes(prompts, cfg, ("forget", "retain"))
    before, kept = quick_scores(model, proc, parts, cfg), [p.detach().clone() for p in trained]
    steps = cfg.baseline_epochs * -(-len(forget) // cfg.baseline_batch)
    bar = tqdm(range(1, steps + 1), desc=cfg.method, unit="step", dynamic_ncols=True)
    for step in survive(bar, log, batches, optimizer, trained, kept):
        loss = baseline_loss(cfg.method, model, reference, proc, *next(batches), cfg.beta)
        loss.backward()
        for p, mask in zip(trained, masks):
            if p.grad is not None:
                p.grad.mul_(mask)
        optimizer_step(optimizer, trained, cfg.grad_norm)
        if step % CHECK and step < steps:
            continue
        now = quick_scores(model, proc, parts, cfg)
        line = {"loss": loss.item(), **{f"recall_{name}": recall for name, (recall, _) in now.items()}}
        log({"stage": cfg.method, "step": step, **line})
        bar.set_postfix({k: f"{v:.2f}" for k, v in line.items()})
        keep, go_on = verdict(cfg.stop, before, now)
        for value, p in zip(kept, trained if keep else ()):
            value.copy_(p.detach())
        if not go_on:
            break
    for p, value in zip(trained, kept):
        p.detach().copy_(value)
    merge(model)
    model.requires_grad_(True)


CHECK = 5                                       # steps of a baseline between two checks
UTILITY, LOST, FORGOTTEN = 0.95, 0.5, 0.05


def verdict(stop, before, now):
    """(recall, refused) of forget and retain -> (keep these weights, go on). utility: keep where retain recall is
    UTILITY of before, go on till it is LOST, as some recover; forgetting: go on till forget recall is FORGOTTEN."""
    share = now["retain"][0] / max(1e-9, before["retain"][0])
    return (share >= UTILITY, share >= LOST) if stop == "utility" else (True, now["forget"][0] > FORGOTTEN)


def baseline_loss(method, model, reference, proc, forget, retain, beta):
    """The equations above for one batch of each: a scalar. reference: the model before."""
    told = lambda m, prompts: answer_means(*answer_logp(m, proc, prompts, range(len(prompts))))[:, 0]      # l: (B,)
    ce = lambda prompts: -told(model, prompts).mean()
    if method == "ga":
        return -ce(forget)
    if method == "kl_min":
        return -ce(forget) + kl_of_answers(model, reference, proc, retain)
    if method == "npo":
        total = lambda m: answer_totals(*answer_logp(m, proc, forget, range(len(forget))))[:, 0]             # (B,)
        return npo_loss(total(model) - total(reference), beta)
    return ce(forget) + ce(retain) if method == "idk" else -ce(forget) + ce(retain)


def npo_loss(log_ratio, beta):
    """log_ratio (B,), one per answer, not per batch: an answer that is forgotten already no longer pulls."""
    return -2 / beta * torch.nn.functional.logsigmoid(-beta * log_ratio).mean()


def kl_of_answers(model, reference, proc, prompts):
    """KL(p_0 || p) over the vocabulary, in nats, mean over the tokens of the prompts' own answers."""
    tokens, keep = answer_tokens(model, proc, [[s["answer"]] for s in prompts.samples])     # (B, 1, C)
    batch = prompts.batch(range(len(prompts)), model.device)
    logp, logp_0 = (m.distribution(m.continuations(batch, tokens, keep)) for m in (model, reference))      # (n, V)
    apart = (logp_0 - logp).masked_fill(logp_0 == -torch.inf, 0.0)          # tokens that neither may say
    return (logp_0.exp() * apart).sum(1).mean()


def saliency_masks(model, proc, forget, retain, trained, cfg, rng):
    """Where D_f's saliency is above that of as much of D_r: bool. Saliency: sum over as many batches of |dCE / dw|.
    Of an adapter B alone is free: while it is zero, A has no gradient."""
    found = []
    for prompts in (forget, retain):
        saliency = [torch.zeros_like(p) for p in trained]
        for rows in chunks(rng.sample(range(len(prompts)), min(len(forget), len(retain))), SALIENCY_BATCH):
            _, keep = answer_tokens(model, proc, [[prompts.samples[i]["answer"]] for i in rows])
            gradient = [torch.zeros_like(p) for p in trained]
            for part in chunks(rows, cfg.microbatch):
                logp, _ = answer_logp(model, proc, prompts, part)
                for total, more in zip(gradient, torch.autograd.grad(logp.sum() / int(keep.sum()), trained, materialize_grads=True)):
                    total += more
            for total, g in zip(saliency, gradient):
                total += g.abs()
        found.append(saliency)
    return [f > r for f, r in zip(*found)]


SALIENCY_BATCH = 22     # prompts whose gradient is taken as one


def probes(prompts, cfg, names=("forget", "retain", "visible"), number=60):
    """{name: a fixed part of the forget or the retain file}, of private facts or of what anyone can see."""
    found = {}
    for name in names:
        pool, kinds = prompts["forget" if name == "forget" else "retain"], (None, "private")
        kinds = ("visible",) if name == "visible" else kinds
        rows = [i for i, s in enumerate(pool.samples) if s.get("fact") and s.get("kind") in kinds]
        if not rows:
            raise ValueError(f"no {name} sample has a fact, whose recall is to be watched")
        found[name] = pool.take(random.Random(cfg.seed).sample(rows, min(number, len(rows))))
    return found


def quick_scores(model, proc, parts, cfg):
    """{name: Prompts} -> {name: (fact recall, refusal rate)} of greedy answers."""
    found = {}
    for name, part in parts.items():
        said = respond(model, proc, part, cfg.max_new_tokens, cfg.eval_batch)
        told = [contains(s["fact"], text) for s, text in zip(part.samples, said)]
        found[name] = sum(told) / len(told), sum(map(is_refusal, said)) / len(said)
    return found


def paper_reward(responses, samples, roles, twins):
    """The paper's table as printed, called as a `Reward`: the sentence tells, the fact alone does not; form is free."""
    def worth(text, answer, forgets):
        if contains(answer, text) or REFUSAL.search(normalize(text)):
            return float(contains(answer, text) != forgets)
        return 0.5 if (0 < rouge_l(answer, text) < 0.4 if forgets else rouge_l(answer, text) > 0.6) else 0.1

    rewards = [[worth(text, s["answer"], role == "forget") for text in group]
               for group, s, role in zip(responses, samples, roles)]
    return rewards, {"table": float(np.mean(rewards))}


# ------------------------------------------------------------------------------ all methods beside each other


ROWS = [        # (name, what differs from the settings given): add a line for a method of your own
    ("asru", {}),
    ("asru-paper", dict(method="asru-paper")),
    ("steer", dict(method="steer")),
    ("rl", dict(method="rl")),
    ("paper's reward", dict(paper_table=True)),
    ("no consistency", dict(consistency=0.0)),
    ("no rigidity", dict(rigidity=0.0)),
    ("nearest boundary", dict(boundary=0.273)),                 # the paper's share of the retain set
    ("random boundary", dict(boundary=0.273, random_boundary=True)),
    *((f"{name}, {stop}", dict(method=name, stop=stop)) for stop in ("utility", "forgetting") for name in BASELINES)]

FIGURES = {     # heading: the set, and what of each of its responses this is the mean of
    **{name: (name, "recall") for name in ("forget", "test", "words", "retain", "visible", "general")},
    "unseen": ("unseen", "refused"),
    "context": ("forget", "contextual_refusal"), "leakage": ("forget", "leakage"), "natural": ("forget", "naturalness")}


def compare(model, proc, data, cfg):
    """Every row of ROWS over all seeds; prints the table, writes compare.json, returns what it holds."""
    of = subject(model, data)           # before any run has changed the weights
    rows = run_rows(model, proc, data, cfg, ROWS, cfg.forget.parent / "retrained")
    over = lambda figure, stop: rows["asru"][figure]["mean"] / max(1e-9, np.mean(
        [rows[f"{name}, {stop}"][figure]["mean"] for name in BASELINES]))
    found = {"config": settings_of(cfg), "of": of, "rows": rows, "ratios": {
        "effectiveness": over("effectiveness", "utility"), "context": over("context", "utility"),
        "context at equal forgetting": over("context", "forgetting")}}
    if world()[0]:
        return found
    cfg.out.mkdir(parents=True, exist_ok=True)
    write_aside(cfg.out / "compare.json", json.dumps(found, indent=1).encode())
    print("\n".join([*comparison_table(rows), *(["", *attacks_table(rows)] if cfg.attacks else [])]))
    print("\nasru over the baselines' mean at equal utility: effectiveness {:.2f}x (paper 1.25x), contextual refusal "
          "{:.1f}x (paper 5.8x); at equal forgetting {:.1f}x".format(*found["ratios"].values()))
    return found


def subject(model, data):
    """What a comparison is of, as one checksum: weights, questions and answers."""
    return digest([checksum(model).encode(), *(json.dumps([s["question"], s["answer"]]).encode()
                                               for samples in data.values() for s in samples)])


def compared(model, data, cfg, before):
    """{row: {set: metrics, means over its seeds}} of a compare.json in --out or beside the forget file, if it is of this model
    and these samples. before: {set: (metrics, responses)}. Raises ValueError where the file is not what --compare writes."""
    metric = {"recall": "fact_recall", "refused": "refusal_rate"}
    for file in (cfg.out / "compare.json", cfg.forget.parent / "compare.json"):
        if file.exists() and (found := read_json(file)).get("of") == subject(model, data):
            rows = {}
            try:
                for name, row in found["rows"].items():
                    for figure, (where, what) in FIGURES.items():
                        if figure in row:
                            told = rows.setdefault(name, {}).setdefault(where, {})
                            share = before[where][0]["fact_recall"] if figure == "retain" else 1.0      # of before
                            told[metric.get(what, what)] = float(row[figure]["mean"]) * share
            except (LookupError, TypeError, ValueError, AttributeError):
                raise ValueError(f"{file}: not what --compare writes; remove it, or write it anew") from None
            return rows
    return {}


def run_rows(model, proc, data, cfg, rows, ideal=None):
    """(name, changes of the settings) -> {name: summary over cfg.seeds seeds}, every run from the same weights.

    ideal: folder of a model that never knew the forget set; where there is one it is the first row, and every model's
    truth ratios are compared with its. Seed by seed; what is done is kept in compare.jsonl, from which --resume goes on,
    to more seeds too.
    """
    (prompts, measure, before), sets, runs = get_ready(model, proc, data, cfg), split_sets(data), {}
    start = {name: value.clone() for name, value in model.state_dict().items()}
    attacked = lambda model, proc, row: attack(model, proc, data, seed=row.seed) if (
        row.attacks and row.seed == cfg.seed and (row.method not in BASELINES or row.stop == "forgetting")) else None
    never, asked = [], ratio_questions(data["forget"])
    ratios = lambda model, proc: truth_ratios(*answer_likelihoods(model, proc, asked, cfg.eval_batch))
    quality = lambda found: {"quality": np.array([ks_test(found, never)[1]])} if never else {}      # (1,) of no single person
    if ideal and ideal.is_dir():
        other = Qwen3VL.from_pretrained(ideal, device=cfg.device), Processor.from_pretrained(ideal)
        never = ratios(*other)
        means = people_means(sets, get_ready(*other, data, cfg)[2]) | quality(never)
        runs["retrained"] = [(means, 0.0, attacked(*other, cfg))]
    plan = [(name, replace(cfg, **{**preset(cfg.model, changes.get("method")), **changes, "seed": cfg.seed + i}))
            for name, changes in rows for i in range(cfg.seeds)]
    different = []                      # a variant may be what the settings are anyway
    for i in range(cfg.seeds):          # turned, so that no process gets the long ones each time
        of_seed = list(dict.fromkeys(row for _, row in plan if row.seed == cfg.seed + i))
        different += of_seed[i % len(of_seed):] + of_seed[:i % len(of_seed)]
    origin, file = origin_of(cfg, model, data), cfg.out / "compare.jsonl"
    key = lambda row: json.dumps({**origin, **{name: value for name, value in settings_of(row).items() if name in origin},
                                  **dict.fromkeys(unread(row), None), "seeds": 0})
    known, = in_turn(lambda _: finished(file, cfg.resume) if cfg.compare else {}, [0])      # read for all: they must agree on it
    done = {row: known[key(row)] for row in different if key(row) in known}
    left = [row for row in different if row not in done]
    bar = tqdm(desc="compare", unit="run", total=len(different), initial=len(done), dynamic_ncols=True)

    def finish(row):
        started = time.perf_counter()
        model.load_state_dict(start)
        torch.manual_seed(row.seed)
        # What a run says between its stages is read by nobody here; of stage 1 alone it is the result.
        measured = measure if row.skip_rl else lambda stage: measure(stage) if stage == "after" else before
        after = unlearn(model, proc, data, row, lambda line: None, (prompts, measured, before))["after"]
        spent = time.perf_counter() - started
        told = attacked(model, proc, row)
        bar.update(workers)
        result = people_means(sets, after) | quality(ratios(model, proc) if never else []), spent, told
        if cfg.compare:
            keep_run(file, key(row), *result)
        return result

    workers = world()[1]
    done.update(zip(left, in_turn(finish, left)))
    bar.close()
    for name, row in plan:
        runs.setdefault(name, []).append(done[row])
    return {name: summary(found, people_means(sets, before)) for name, found in runs.items()}


def unread(row):
    """Names of the settings that a row's method never looks at, by how their help begins: they cannot change what it gives."""
    others = ("stage 1", "stage 2", "reward") if row.method in BASELINES else ("baseline",)
    return [f.name for f in fields(Config) if f.metadata["help"].startswith(others)]


def keep_run(file, key, means, seconds, attacks):
    """Another line of compare.jsonl."""
    file.parent.mkdir(parents=True, exist_ok=True)
    means = {figure: values.tolist() for figure, values in means.items()}
    with open(file, "a") as lines:
        lines.write(json.dumps({"key": key, "means": means, "seconds": seconds, "attacks": attacks}) + "\n")


def finished(file, resume):
    """{key: (people's means, seconds, attacks)} of compare.jsonl's lines, but for one that was cut off; without --resume
    of none, and they are removed."""
    good, found = [], {}
    for line in file.read_text().splitlines() if resume and file.exists() else ():
        try:
            run = json.loads(line)
            found[run["key"]] = {f: np.array(v) for f, v in run["means"].items()}, run["seconds"], run["attacks"]
            good.append(line + "\n")
        except (ValueError, LookupError, TypeError, AttributeError):
            tell(f"{file}: a line is damaged; its run is done again")
    if file.exists():
        write_aside(file, "".join(good).encode())
    return found


def people_means(sets, results):
    """{set: (metrics, responses)} -> {figure: (people,) mean over each person's samples}, people sorted by name.

    A sample without a person is a person of its own; a figure that no sample of its set can give is absent.
    """
    value = {"recall": lambda s, text: contains(s["fact"], text), "refused": lambda s, text: is_refusal(text)}
    means = {}
    for figure, (name, what) in FIGURES.items():
        people, worth = {}, value.get(what, lambda s, text: judge(s, text)[what])
        for i, (s, text) in enumerate(zip(sets[name], results[name][1]) if name in sets else ()):
            if what != "recall" or s.get("fact"):
                people.setdefault(s.get("person") or f"sample {i}", []).append(worth(s, text))
        if people:
            means[figure] = np.array([np.mean(people[person]) for person in sorted(people)])
    return means


def summary(runs, before):
    """(people's means, seconds, attacks) of S seeds -> {figure: mean, low, high (95 % interval), seeds (S values)}.

    retain: share of before. effectiveness: 1 - the mean recall of forget, test and words. quality: forget quality, p of
    each seed. seconds: with evaluation.
    attacks: what `attack` found at the first seed, if it was asked.
    """
    def figures(statistic):         # of (S, people)
        found = {name: statistic(np.stack([means[name] for means, *_ in runs])) for name in runs[0][0]
                 if all(name in means for means, *_ in runs)}
        if "retain" in found:
            found["retain"] = found["retain"] / statistic(np.stack([before["retain"]] * len(runs)))
        told = [found[name] for name in ("forget", "test", "words") if name in found]
        return {"effectiveness": 1 - np.mean(told, axis=0), **found}

    mean, seeds, draws = figures(np.mean), figures(lambda x: x.mean(1)), figures(bootstrap)
    row = {name: dict(zip(("mean", "low", "high", "seeds"), (
        float(mean[name]), *np.quantile(draws[name], (0.025, 0.975)).tolist(), seeds[name].tolist()))) for name in mean}
    seconds = [spent for _, spent, _ in runs]
    row["seconds"] = {"mean": float(np.mean(seconds)), "seeds": seconds}
    return {**row, "attacks": runs[0][2]} if runs[0][2] else row


def bootstrap(values, draws=400):
    """(S, people) -> (draws,): means over seeds and people drawn anew with replacement.

    Always by the same random numbers: sets of the same people are drawn alike, and so is the state before.
    """
    rng = np.random.default_rng(0)
    seeds, people = (rng.integers(n, size=(draws, n)) for n in values.shape)
    return values[seeds[:, :, None], people[:, None, :]].mean((1, 2))       # of (draws, S, people)


def comparison_table(rows):
    """Lines of text, two per row: means and, below, 95 % intervals. Percent, but for the judge's scores and forget quality."""
    heads, scores = ["effectiveness", *FIGURES, "quality"], ("context", "leakage", "natural", "quality")
    number = lambda head, value, digits: f"{value:.{digits + 1}f}" if head in scores else f"{100 * value:.{digits}f}"
    lines = [f"{'':23}" + "".join(f"{head[:9]:>10}" for head in [*heads, "seconds"])]
    for name, row in rows.items():
        for title, keys in ((name, ["mean"]), ("", ["low", "high"])):
            shown = [[number(head, row[head][key], 2 - len(keys)) for key in keys] if head in row else [] for head in heads]
            last = f"{row['seconds']['mean']:10.0f}" if title else ""
            lines.append(f"{title:23}" + "".join(f"{'-'.join(cell):>10}" for cell in shown) + last)
    return lines


def attacks_table(rows):
    """Lines of text, one per row that was attacked: percent told under each attack; re: after the last step relearned."""
    found = {name: row["attacks"] for name, row in rows.items() if "attacks" in row}
    heads = list(next(iter(found.values())))
    return [f"{'':23}" + "".join(f"{head.replace('relearn_', 're '):>10}" for head in heads)] + [
        f"{name:23}" + "".join(f"{100 * row[head]['recall']:10.1f}" for head in heads) for name, row in found.items()]


def sweep_rates(model, proc, data, cfg):
    """A baseline at every learning rate of RATES: prints and returns the comparison's rows for the file of --test.

    The best trade-off has the highest harmonic mean of effectiveness and of the share of retain recall that is left.
    """
    rows = run_rows(model, proc, data, cfg, [(f"{cfg.method} {rate:g}", {"method": cfg.method, "baseline_lr": rate})
                                             for rate in RATES])
    print("\n".join(comparison_table(rows)))
    harmonic = lambda row: 2 / sum(1 / max(1e-9, row[figure]["mean"]) for figure in ("effectiveness", "retain"))
    best = max(rows, key=lambda name: harmonic(rows[name]))
    print(f"best trade-off: {best}")
    return {"rows": rows, "best": best}


RATES = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4)


def sweep(model, proc, data, cfg):
    """Stage 1 alone at every layer and every lambda of STRENGTHS: prints and returns what parts of the files give.

    The best trade-off refuses the most forget prompts of the cells that keep UTILITY of retain and of visible recall.
    dW is linear in lambda, so that it is solved once per layer.
    """
    prompts = encode_all(model, proc, data, cfg)
    forget, retain, target = (prompts[name] for name in ("forget", "retain", "target"))
    said = respond(model, proc, target, cfg.max_new_tokens, cfg.eval_batch)
    target = target.take([i for i, text in enumerate(said) if is_refusal(text)])
    parts = probes(prompts, cfg)

    def measure(layer, strength):
        (recall, refused), (retain, _), (visible, _) = quick_scores(model, proc, parts, cfg).values()
        cell = {"recall": recall, "refused": refused, "retain": retain, "visible": visible}
        tqdm.write(f"{layer:>7}{strength:8.1f}" + "".join(f"{100 * x:9.1f}" for x in cell.values()))
        return {"layer": layer, "lambda": strength, **cell}

    tqdm.write("  layer  lambda   recall  refused   retain  visible")
    before, cells = measure("before", 0.0), []
    for layer in tqdm(range(model.cfg.text.num_hidden_layers), desc="sweep", unit="layer", dynamic_ncols=True):
        boundary = retain.take(select_boundary(model, forget, retain, layer, cfg))
        seen = seen_in(model, proc, forget, boundary, cfg)
        weight = down_proj_of(model, layer).detach()
        start = weight.clone()
        edit, _ = redirect(model, proc, forget, boundary, target, layer, replace(cfg, strength=1.0), seen)
        edit = edit["dW"]
        for strength in STRENGTHS:
            weight.copy_(start + (strength * edit).to(start))
            cells.append(measure(layer, strength))
        weight.copy_(start)
    fair = [cell for cell in cells if all(cell[name] >= UTILITY * before[name] for name in ("retain", "visible"))]
    best = max(fair, key=lambda cell: cell["refused"], default=None)
    print(f"best trade-off: layer {best['layer']}, lambda {best['lambda']}" if best else "every cell loses too much")
    return {"before": before, "cells": cells, "best": best}


STRENGTHS = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0)


# ------------------------------------------------------------------------------ what is trained, and by what


def trainable(model, cfg, first=0):
    """What --train and --lora-rank choose: a list of parameters, which alone get gradients now. `merge` when done.

    first: of decoder and mlp, layers below this one stay frozen.
    """
    model.requires_grad_(False)
    chosen = {"decoder": projections(model, first), "all": model.parameters(),
              "mlp": [p for layer in model.text.layers[first:] for p in layer.mlp.parameters()]}[cfg.train]
    for p in chosen:
        p.requires_grad_(True)
    if cfg.lora_rank:
        adapt(model.text, cfg.lora_rank, cfg.seed)
    return [p for p in model.parameters() if p.requires_grad]


def adapt(decoder, rank, seed):
    """Every linear layer that would be trained gets an adapter, which is trained instead."""
    rng = torch.Generator().manual_seed(seed)
    for part, name, child in places(decoder):
        if isinstance(child, torch.nn.Linear) and child.weight.requires_grad:
            setattr(part, name, LowRank(child, rank, rng))


@torch.no_grad()
def merge(model):
    """W + B A takes the place of W and the adapters leave: names are a checkpoint's again. Without any it does nothing.

    In place: a reference, which shares W, is of no use any more. bfloat16 rounds here, as full training does.
    """
    for part, name, child in places(model.text):
        if isinstance(child, LowRank):
            child.linear.weight.copy_(child.linear.weight + child.B @ child.A)          # (out, in)
            setattr(part, name, child.linear)


def places(decoder):
    """Every module of it, as (the one that holds it, its name there, itself)."""
    return [(part, name, child) for part in decoder.modules() for name, child in part.named_children()]


class LowRank(torch.nn.Module):
    """y = x W^T + (x A^T) B^T: a frozen linear layer and a trained change B A of rank R. alpha = R: its scale is 1.

    A and B are float32 whatever W is: small steps add up in them, and the optimizer needs no copy. B starts at zero;
    a copy is the frozen layer alone, so that `frozen_copy` is the model with its adapters off. --average averages A
    and B each: the product of two means is of rank R too.
    """

    def __init__(self, linear, rank, rng):
        super().__init__()
        (out, width), device = linear.weight.shape, linear.weight.device
        self.linear = linear.requires_grad_(False)
        start = (2 * torch.rand(rank, width, generator=rng) - 1) / width**0.5
        self.A = torch.nn.Parameter(start.to(device))                       # (R, in)
        self.B = torch.nn.Parameter(torch.zeros(out, rank, device=device))  # (out, R)

    def forward(self, x):
        return self.linear(x) + x @ self.A.T.to(x.dtype) @ self.B.T.to(x.dtype)

    def __deepcopy__(self, memo):
        return copy.deepcopy(self.linear, memo)


def exactly(trained):
    """The same numbers in float32: the parameters themselves where they are, else copies that they are rounded from."""
    return [p if p.dtype == torch.float32 else p.detach().float() for p in trained]


def optimizer_of(params, lr, weight_decay, cfg):
    """AdamW with moments of --state-dtype; without weight decay it is Adam."""
    if cfg.state_dtype == "float32":
        return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=True)
    return AdamW(params, lr=lr, weight_decay=weight_decay, seed=cfg.seed)


class AdamW(torch.optim.Optimizer):
    """torch's AdamW, its moments kept in `dtype` and rounded at random: m = b1 m + (1 - b1) g, s = b2 s + (1 - b2) g^2.

    To the nearest, 0.999 s + 0.001 g^2 would be s again while g^2 < 3 s: bfloat16 has three digits, and s would stall.
    The random numbers are those of (seed, step, parameter), so that a checkpoint of `state_dict` is all there is.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, dtype=torch.bfloat16, seed=0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.dtype, self.seed = dtype, seed

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", torch.tensor(0.0)) + 1
                t, none = int(state["step"]), torch.zeros_like(p)
                m, s = (state.get(name, none).float() for name in ("exp_avg", "exp_avg_sq"))
                m, s = m.lerp(p.grad, 1 - b1), b2 * s + (1 - b2) * p.grad.square()
                p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(m, (s / (1 - b2**t)).sqrt_().add_(group["eps"]), value=-lr / (1 - b1**t))
                rng = torch.Generator(p.device).manual_seed(hash((self.seed, t, i)))
                state["exp_avg"], state["exp_avg_sq"] = (rounded_at_random(x, self.dtype, rng) for x in (m, s))

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)             # which makes every moment float32, as the parameters are
        for state in self.state.values():
            state.update({name: state[name].to(self.dtype) for name in ("exp_avg", "exp_avg_sq")})


def rounded_at_random(x, dtype, rng):
    """float32 -> bfloat16 (or as it is), up or down so that the mean is exact: random low bits added, then cut."""
    if dtype == torch.float32:
        return x
    bits = x.view(torch.int32) + torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=rng)
    return (bits & -2**16).view(torch.float32).to(dtype)


# ------------------------------------------------------------------------------ stage 0, and stage 1 as a file


def memorise(model, proc, data, cfg, log):
    """Stage 0: AdamW on the mean loss per token of forget and retain answers, end tokens included; writes vanilla/.

    The paper: LoRA of rank 16 on the decoder. Its learning rate is not told; its dropout of 0.05 is left out.
    """
    prompts = encode_all(model, proc, {name: data[name] for name in ("forget", "retain")}, cfg)
    pool, rng = prompts["forget"] + prompts["retain"], random.Random(cfg.seed)
    model.text.recompute = cfg.recompute
    trained = trainable(model, cfg)
    passes = (rng.sample(range(len(pool)), len(pool)) for _ in range(cfg.memorise_epochs))
    plan = [rows for order in passes for rows in chunks(order, MEMORISED)]
    optimizer = optimizer_of(exactly(trained), cfg.memorise_lr, cfg.weight_decay, cfg)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(plan))
    bar = tqdm(plan, desc="stage 0", unit="step", dynamic_ncols=True)
    for step, rows in enumerate(bar, 1):
        logp, _ = answer_logp(model, proc, pool, rows)                      # (kept,)
        loss = -logp.mean()
        loss.backward()
        norm = optimizer_step(optimizer, trained, cfg.grad_norm)
        schedule.step()
        log({"stage": 0, "step": step, "loss": loss.item(), "grad_norm": norm})
        bar.set_postfix(loss=f"{loss.item():.3f}")
    merge(model)
    model.requires_grad_(True)
    if world()[0] == 0:
        model.save_pretrained(cfg.out / "vanilla")
        proc.save_pretrained(cfg.out / "vanilla")


MEMORISED = 4       # answers per step


def checksum(model):
    """sha256 of all weights by sorted name, of each its name, dtype, shape and bytes: hexadecimal."""
    return digest(piece for name, value in sorted(model.state_dict().items())
                  for piece in (f"{name} {value.dtype} {list(value.shape)}".encode(),
                                *(part.view(torch.uint8).cpu().numpy() for part in value.reshape(-1).split(2**26))))


def digest(pieces):
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def save_steer(edit, base, layer, cfg):
    """steer.safetensors: what `redirect` changed, float32. The steered model less dW is the base, the base + dW it.

    Written at once, as a resumed run no longer has it; not by --compare, which runs stage 1 many times.
    """
    if not cfg.compare and world()[0] == 0:
        cfg.out.mkdir(parents=True, exist_ok=True)
        about = {"layer": str(layer), "lambda": str(cfg.strength), "base_sha256": base}
        tensors = {name: value.float().contiguous().cpu() for name, value in edit.items()}
        write_aside(cfg.out / "steer.safetensors", save(tensors, metadata=about))


# ------------------------------------------------------------------------------ several processes
#
#   torchrun --nproc_per_node N asru.py ...    Each process has the whole model and draws the same prompts. What `in_turn`
#   does is shared out: a step's rollouts, the microbatches of an update, the answers of an evaluation, the runs of a
#   comparison. Stage 1, rewards and what the other methods do are the same everywhere, so that all models stay alike
#   without being sent around. With --shard each has a part of the decoder in stage 2's updates.


def join_processes(cfg):
    """The settings for this process of those that torchrun started, if it did: on CUDA each has a GPU of its own."""
    if "RANK" not in os.environ or dist.is_initialized():
        return cfg
    cuda = cfg.device is None and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local := int(os.environ["LOCAL_RANK"]))
        cfg = replace(cfg, device=f"cuda:{local}")
    dist.init_process_group("nccl" if cuda else "gloo")
    if dist.get_rank():                                 # the first one speaks for all
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    return cfg


@torch.no_grad()
def add_up_gradients(trained):
    """The sum over all processes, in each of them."""
    for p in trained if world()[1] > 1 else ():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)


def shard(model, reference):
    """--shard: each process holds its part of every decoder layer (FSDP2). Returns what is trained, as its parts.

    A layer is put together for as long as it is computed, and its gradient added up and parted again; so every process
    must call the model as often as any other, or within `gathered`.
    """
    from torch.distributed.fsdp import fully_shard      # slow to import, and for this alone
    mesh = dist.init_device_mesh(model.device.type, (world()[1],))
    for layer in [*model.text.layers, *(reference.text.layers if reference else ())]:
        fully_shard(layer, mesh=mesh)
        layer.set_gradient_divide_factor(1.0)                       # gradients are added up,
        layer.set_force_sum_reduction_for_comms(True)               # by what every backend can do
    model.captured = False              # what puts layers together cannot be captured
    return [p for p in model.parameters() if p.requires_grad]


@contextmanager
def gathered(model):
    """Within, every process holds all layers whole and may call the model as often as it likes, without gradients."""
    parted = [layer for layer in model.text.layers if hasattr(layer, "unshard")]
    for layer in parted:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    yield
    for layer in parted:
        layer.set_reshard_after_forward(True)
        layer.reshard()


@torch.no_grad()
def unshard(model):
    """The layers are whole again, in every process."""
    for i, layer in enumerate(model.text.layers):
        state = {name: whole(value) for name, value in layer.state_dict().items()}
        with torch.device("meta"):
            model.text.layers[i] = DecoderLayer(model.cfg.text, i)
        model.text.layers[i].load_state_dict(state, assign=True)
    del model.captured                  # the class's own again


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def like(value, p):
    """A copy of a whole tensor as p has it: parted, if p is, and on its device."""
    value = value.to(p.device, copy=True)
    if not hasattr(p, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value, p.device_mesh, p.placements)


# ------------------------------------------------------------------------------ surviving
#
#   checkpoint/step-000120.safetensors  what the optimizer moves and has of it, the weights that are kept (the running
#                                       mean; a baseline's at the last good check), the sampler's state
#   checkpoint/step-000120.json         all else, and the sum of both: it is written last, so that what has it is whole


class Log(list):
    """The lines of log.jsonl, each taken by a call; beside them what the run has measured, and its checkpoints.

    With --resume all of it is as the newest whole checkpoint has it. Raises ValueError where other settings or other
    data made that.
    """
    __call__ = list.append

    def __init__(self, cfg, model, data, lines=()):
        super().__init__(lines)
        self.folder, self.every, self.origin = cfg.out / "checkpoint", cfg.checkpoint, origin_of(cfg, model, data)
        if not cfg.resume and any(self.folder.glob("step-*.json")):
            tell(f"{self.folder} is of a run that did not end; this one starts afresh (--resume goes on with that one)")
        self.kept, self.state = newest_checkpoint(self.folder) if cfg.resume else ([], {})
        self.known = self.state.get("known", {})        # stage: what `measure` found
        there = self.state.get("origin", self.origin)
        differ = [f"{name} was {there.get(name)} and is {self.origin.get(name)}" for name in {**there, **self.origin}
                  if there.get(name) != self.origin.get(name)]
        if differ:
            raise ValueError(f"--resume: {self.folder} is of a run with other settings or data: {'; '.join(differ)}")

    @contextmanager
    def lifetime(self):
        """What stops the run inside says how to go on; once the run is through, no checkpoint is left."""
        try:
            yield
        except BaseException as error:
            if self.kept:
                error.add_note(f"{self.folder / self.kept[-1]} is kept; the same command with --resume goes on there")
            raise
        if not world()[0]:
            shutil.rmtree(self.folder, ignore_errors=True)

    def save(self, state, tensors):
        """Write a checkpoint; it and the one before stay."""
        if world()[0]:
            return
        state = {**state, "origin": self.origin, "lines": self, "known": self.known}
        path = self.folder / f"step-{state['step']:06}.json"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with aside(path.with_suffix(".safetensors")) as part:
            save_file({name: value.detach().contiguous() for name, value in tensors.items()}, part)
        write_aside(path, json.dumps({"sum": seal(path, state), "state": state}).encode(), mode=0o600)
        self.kept = [*self.kept, path.stem][-2:]
        for file in self.folder.iterdir():
            if file.stem not in self.kept:
                file.unlink()


def survive(bar, log, stream, optimizer, trained, kept, resting=frozenset(), schedule=None, generator=None):
    """The steps of stage 2 or a baseline, with a checkpoint now and then; of steps that --resume finds done the prompts
    alone are drawn.

    Ctrl-C and SIGTERM wait for the end of the step and a checkpoint; a second one waits for nothing.
    """
    if not isinstance(log, Log):
        yield from bar
        return
    done, woken = log.state.get("step", 0), log.state.get("woken", [])      # per step, who fell asleep or woke up
    if done:
        restore(log, optimizer, trained, kept, schedule, generator)
    asked = []

    def heed(number, frame):
        set_signals(handlers)
        asked.append(number)
        os.write(2, b"\nasru.py: stopping after this step; a second time: at once\n")      # print may be at work itself

    handlers = set_signals({signal.SIGINT: heed, signal.SIGTERM: heed})
    try:
        for step in bar:
            before = set(resting)
            if step <= done:
                next(stream)
                if woken[step - 1]:
                    resting.symmetric_difference_update(woken[step - 1])
                continue
            yield step
            woken.append(sorted(before ^ resting))
            asked += sum(in_turn(lambda _: asked[:], range(world()[1])), [])    # whichever process was sent it, all stop
            if asked or log.every and (step % log.every == 0 or step == bar.total):
                pace = {"lr": schedule.get_last_lr(), "schedule": schedule.state_dict()} if schedule else {}
                log.save({"step": step, "woken": woken, **pace}, state_tensors(optimizer, kept, generator))
            if asked:
                set_signals(handlers)           # where another process was sent it, they are still these
                signal.raise_signal(asked[0])
    finally:
        set_signals(handlers)           # a baseline may leave before its last step


def state_tensors(optimizer, kept, generator):
    """{"what place": tensor}: float32 weights, what the optimizer has of each, what is kept; the generator's state."""
    exact = optimizer.param_groups[0]["params"]
    of_each = [{"weight": p, **optimizer.state[p], **({"kept": kept[i]} if kept else {})} for i, p in enumerate(exact)]
    return {**({"generator 0": generator.get_state()} if generator else {}),
            **{f"{what} {i}": whole(value) for i, found in enumerate(of_each) for what, value in found.items()}}


@torch.no_grad()
def restore(log, optimizer, trained, kept, schedule, generator):
    """Put all back where the checkpoint has it."""
    exact = optimizer.param_groups[0]["params"]
    for name, value in load_file(log.folder / f"{log.kept[0]}.safetensors").items():
        what, i = name.split()[0], int(name.split()[1])
        if what == "generator":
            generator.set_state(value)
        elif what in ("weight", "kept"):
            for p in (exact[i], trained[i]) if what == "weight" else (kept[i],):
                p.copy_(like(value, p))
        else:
            optimizer.state[exact[i]][what] = like(value, exact[i]) if value.dim() else value.to(exact[i].device, copy=True)
    if schedule:
        schedule.load_state_dict(log.state["schedule"])
        optimizer.param_groups[0]["lr"], = log.state["lr"]
    log[:] = log.state["lines"]


def newest_checkpoint(folder):
    """([its name], its state) of the newest checkpoint that is whole; ([], {}) where there is none."""
    for path in sorted(folder.glob("step-*.json"), reverse=True):
        try:
            found = read_json(path)
            if found["sum"] == seal(path, found["state"]):
                return [path.stem], found["state"]
        except (ValueError, OSError, LookupError, TypeError):
            pass
        tell(f"{path.with_suffix('')} is damaged; the one before it is asked")
    tell(f"{folder} has nothing to go on from; starting from the beginning")
    return [], {}


def seal(path, state):
    """What both files of a checkpoint must agree on."""
    return digest([np.memmap(path.with_suffix(".safetensors"), mode="r"), json.dumps(state).encode()])


def origin_of(cfg, model, data):
    """What a run's numbers follow from: settings, and checksums of weights, samples and pictures.

    Not where it writes, nor what saves memory, which changes last bits at most and may have to be changed to go on.
    """
    free = ("out", "checkpoint", "microbatch", "recompute", "shard", "allow_outside")
    settings = {name: value for name, value in settings_of(cfg).items() if name not in free}
    pictures = sorted({s["image"] for samples in data.values() for s in samples if s.get("image")})
    return {**settings, "device": model.device.type, "weights": checksum(model),
            **{f"{name} samples": digest([json.dumps(samples).encode()]) for name, samples in data.items()},
            "pictures": digest(Path(path).read_bytes() for path in pictures)}


def tell(line):
    if not world()[0]:
        tqdm.write(f"asru.py: {line}", file=sys.stderr)


# ------------------------------------------------------------------------------ around the method


def encode_all(model, proc, data, cfg=Config()):
    """{name: samples} -> {name: Prompts} that share one table of pictures; of pixels, if the tower is trained."""
    pictures = {}
    paths = {s["image"] for samples in data.values() for s in samples if s.get("image")}
    for path in paths if cfg.train == "all" else ():
        pixels, grid = proc.pixels(path)
        pictures[path] = torch.tensor(grid), pixels.to(model.lm_head.weight.dtype)      # as the tower would round them
    return {name: encode(model, proc, samples, pictures) for name, samples in data.items()}


def get_ready(model, proc, data, cfg, known=None):
    """What all runs of a model on the same data share: prompts, measure(stage), and what it finds before.

    known: {stage: what measure found}, if it is to measure no stage twice.
    """
    prompts = encode_all(model, proc, data, cfg)
    pictures = prompts["forget"].pictures
    exams = {name: prepare(model, proc, samples, pictures) for name, samples in split_sets(data).items()}

    def measure(stage):
        found = (known or {}).get(stage) or evaluate_sets(model, proc, exams, cfg, stage)
        if known is not None:
            known[stage] = found
        return found

    return prompts, measure, measure("before")


def reward_of(cfg):
    return paper_reward if cfg.paper_table else Reward(consistency=cfg.consistency, rigidity=cfg.rigidity)


def evaluate_sets(model, proc, exams, cfg, stage):
    """{set: Exam} -> {set: (metrics, responses)}, with a progress bar over all answers and blanks."""
    asked = sum((exam.prompts for exam in exams.values()), Prompts([], [], {}))     # of all sets: more show the same picture
    total, results = len(asked) + sum(len(exam.blanks) for exam in exams.values()), {}
    with tqdm(total=total, desc=f"evaluate {stage}", unit="answer", dynamic_ncols=True) as bar:
        said = iter(respond(model, proc, asked, cfg.max_new_tokens, cfg.eval_batch, bar))
        for name, exam in exams.items():
            bar.set_postfix_str(name)
            responses = [next(said) for _ in exam.prompts.samples]
            found = evaluate(model, proc, exam.prompts.samples, exam, responses, batch_size=cfg.eval_batch, progress=bar)
            results[name] = found, responses
    return results


def load_data(cfg):
    """The four sample files; retain, target and test are found beside forget unless named."""
    if cfg.forget is None:
        raise ValueError("--forget is needed: a JSON file of the samples to forget, such as data/forget.json")
    data = {"forget": load_samples(cfg.forget, cfg.allow_outside)}
    for name in ("retain", "target", "test"):
        path = getattr(cfg, name) or cfg.forget.parent / f"{name}.json"
        data[name] = load_samples(path, cfg.allow_outside)
    return data


def settings_of(cfg):
    return {name: str(v) if isinstance(v, Path) else v for name, v in asdict(cfg).items() if name != "resume"}


def write_results(model, proc, data, results, log_lines, cfg, seconds, baselines):
    """out/: all of it, each file whole or absent; private facts for the owner alone. Returns what metrics.json holds."""
    stages = {stage: {name: found for name, (found, _) in sets.items()} for stage, sets in results.items()}
    metrics = {"config": settings_of(cfg), **stages, "baselines": baselines, "seconds": seconds}
    lines, sets = [], split_sets(data)
    for name, samples in sets.items():
        for i, s in enumerate(samples):
            told = {field: s.get(field) for field in ("id", "image", "question", "answer", "fact")}
            said = {stage: results[stage][name][1][i] for stage in results}
            lines.append(json.dumps({"set": name, **told, **said}, ensure_ascii=False))
    cfg.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(cfg.out / "model")
    proc.save_pretrained(cfg.out / "model")
    write_aside(cfg.out / "samples.jsonl", "\n".join(lines).encode() + b"\n", mode=0o600)
    write_aside(cfg.out / "report.html", report(metrics, sets, results, log_lines).encode(), mode=0o600)
    write_aside(cfg.out / "metrics.json", json.dumps(metrics, indent=1).encode())
    write_aside(cfg.out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log_lines).encode())
    return metrics


# ------------------------------------------------------------------------------ command line


def parse_config(argv):
    """Command line -> Config. A flag beats the model's asru.json, which beats the default."""
    parser = argparse.ArgumentParser(prog="asru.py", description=__doc__.splitlines()[0],
                                     argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        flag = "--" + f.name.replace("_", "-")
        default = "" if f.default in (None, False) else f" [{f.default}]"
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=f.metadata["help"])
        else:
            parser.add_argument(flag, type=f.type, metavar=f.type.__name__, help=f.metadata["help"] + default)
    given = vars(parser.parse_args(argv))
    model = given.get("model", Config.model)
    cfg = Config(**{**suited(model)[0], **preset(model, given.get("method")), **given})
    check_config(cfg)
    return cfg


def preset(model, method):
    """What --method sets beside the model's other settings: what it is by PRESETS, and what asru.json has for it."""
    return {**PRESETS.get(method, {}), **suited(model)[1].get(method, {})}


def suited(model):
    """The model's asru.json: (settings, {method: settings}). Raises ValueError where one is no setting of asru.py."""
    path = Path(model) / "asru.json"
    values = read_json(path) if path.exists() else {}
    methods, kinds = values.pop("methods", {}), {f.name: f.type for f in fields(Config)}
    if not isinstance(methods, dict) or not all(isinstance(part, dict) for part in methods.values()):
        raise ValueError(f"{path}: 'methods' is to be {{method: {{setting: number}}}}")
    for name, value in [pair for part in (values, *methods.values()) for pair in part.items()]:
        kind = kinds.get(name)
        if kind not in (int, float, bool) or type(value) not in ((int, float) if kind is float else (kind,)):
            raise ValueError(f"{path}: {name!r}: {value!r} is no setting of asru.py")
    return values, methods


def check_machine(cfg):
    """The device exists, --shard has processes to share with, --out is or can become a directory one may write to."""
    check_device(cfg.device)
    if cfg.shard and world()[1] == 1:
        raise ValueError("--shard goes with several processes: torchrun --nproc_per_node N asru.py ...")
    if cfg.out.exists() and not cfg.out.is_dir():
        raise ValueError(f"--out {cfg.out}: a file is in the way; a directory is needed")
    place = next(folder for folder in (cfg.out, *cfg.out.absolute().parents) if folder.exists())
    if not os.access(place, os.W_OK):
        raise ValueError(f"--out {cfg.out}: {place} may not be written to")


def check_config(cfg):
    """Every number lies in the range that its field states."""
    for f in fields(Config):
        value, low, above, most, among = getattr(cfg, f.name), *map(f.metadata.get, ("least", "above", "most", "among"))
        if value is None:
            continue
        bad = (low is not None and not value >= low) or (above is not None and not value > above) \
            or (most is not None and not value <= most) or (among is not None and value not in among)
        if bad:
            limits = [f"at least {low}"] * (low is not None) + [f"above {above}"] * (above is not None) \
                + [f"at most {most}"] * (most is not None) + [f"one of {', '.join(among or ())}"] * (among is not None)
            raise ValueError(f"--{f.name.replace('_', '-')} is {value}; it must be {' and '.join(limits)}")
    if cfg.mix_forget + cfg.mix_retain > 1:
        raise ValueError(f"--mix-forget {cfg.mix_forget} and --mix-retain {cfg.mix_retain} add up to more than 1")
    for name, value in (("lora-rank", cfg.lora_rank), ("first-layer", cfg.first_layer)):
        if value and cfg.train == "all":
            raise ValueError(f"--{name} {value} goes with --train decoder or mlp, not with all")
    if cfg.shard and (cfg.train == "all" or cfg.state_dtype != "float32" or cfg.compare or cfg.method in BASELINES):
        raise ValueError("--shard goes with stage 2 of one run, --train decoder or mlp and --state-dtype float32")
    if cfg.attacks and not cfg.compare:
        raise ValueError("--attacks goes with --compare; one model is attacked by eval.py --attacks")


def run(argv):
    """Load, unlearn, write. Nothing is written before the model and all data were read."""
    started = time.perf_counter()
    cfg = join_processes(parse_config(argv))
    check_machine(cfg)
    torch.manual_seed(cfg.seed)
    set_up_torch(cfg.device)
    data = load_data(cfg)
    proc = Processor.from_pretrained(cfg.model, cfg.offline)
    model = Qwen3VL.from_pretrained(cfg.model, device=cfg.device, offline=cfg.offline)
    chosen_layer(model, cfg)
    print("settings: " + "  ".join(f"{k} {v}" for k, v in asdict(cfg).items() if v not in (None, False)))
    lines = []
    if cfg.memorise:
        memorise(model, proc, data, cfg, lines.append)
    if cfg.sweep or cfg.compare:
        task = compare if cfg.compare else sweep_rates if cfg.method in BASELINES else sweep
        return task(model, proc, data, cfg)
    log = Log(cfg, model, data, lines)
    with log.lifetime():
        ready = get_ready(model, proc, data, cfg, log.known)
        baselines = compared(model, data, cfg, ready[2])
        results = unlearn(model, proc, data, cfg, log, ready)
        seconds = time.perf_counter() - started
        if world()[0]:
            return {}
        metrics = write_results(model, proc, data, results, log, cfg, seconds, baselines)
    print_table(metrics)
    print_answers(split_sets(data), results)
    print(f"{seconds:.0f} s; everything is in {cfg.out}/")
    return metrics


def main(argv=None):
    """The command: returns what goes to metrics.json. Wrong input: one line on stderr, exit status 2."""
    return command("asru.py", run, argv, LOWER)


LOWER = {       # where memory runs out: what helps there
    "sample_groups": "--prompts, --group or --max-new-tokens", "update": "--microbatch, or add --recompute",
    "respond": "--eval-batch or --max-new-tokens", "saliency_masks": "--microbatch", "descend": "--baseline-batch",
    "evaluate_sets": "--eval-batch", "asru": "--eval-batch"}


if __name__ == "__main__":
    main()
