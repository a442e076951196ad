"""Speed and memory against transformers' Qwen3-VL, same weights, prompts and number of tokens: one table, ratios from one run.

    python .ci/bench.py              the embedded model and a CPU shape (300 image tokens, prompt 350, response 40, G 8)
    python .ci/bench.py --quick      two pairs instead of five
    python .ci/bench.py --cuda       the 2B, 4B and 8B shapes with random bfloat16 weights on one GPU
    python .ci/bench.py --memory     what stage 2 needs at these shapes, computed, and the cards that hold it

A ratio is the median over alternating pairs of (transformers' time / ours). transformers does what TRL's GRPOTrainer asks of it:
`generate` with every prompt repeated G times, then full rows of prompt and response through the policy (with gradient) and through
the reference, the head at response positions, the same loss and optimizer. End tokens are switched off, so that both write as many. The
embedded model has its own temperature and writes as many tokens as its answers have; the others draw from random weights.
On CUDA each side has the GPU to itself, in a process of its own, and a ratio is that of two medians.
"""
import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import asru                                                                 # noqa: E402
from eval import Prompts, encode, load_samples, projections                 # noqa: E402
from model_qwen3vl import Batch, Processor, Qwen3VL, Qwen3VLConfig          # noqa: E402
from reward import Reward                                                   # noqa: E402

EMBEDDED = ROOT / "data/tiny-qwen3vl"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two pairs instead of five")
    parser.add_argument("--cuda", nargs="*", metavar="SHAPE", help="real shapes on one GPU: 2B 4B 8B, or some of them")
    parser.add_argument("--memory", action="store_true", help="what stage 2 needs on one GPU, computed from the shapes")
    parser.add_argument("--alone", nargs=3, metavar=("WHAT", "SIDE", "CASE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        return memory_table()
    if args.alone:
        what, side, case = args.alone
        settings(side)
        return print(json.dumps({"memory": peak_memory, "cuda": cuda_side, "limits": machine_limits}[what](side, case)))
    pairs = 2 if args.quick else 5
    if args.cuda is not None:
        return cuda_table(args.cuda or ["2B", "4B", "8B"])
    torch.set_num_threads(2)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratio = transformers / ours, median of {pairs} pairs (range)\n")
    print(f"{'case':10}{'what':30}{'ours':>10}{'transformers':>14}{'ratio':>8}   range")
    for name in ("embedded", "cpu-shape"):
        case = Case(name).train()
        for what, ours, theirs in (("prefill", case.prefill, case.hf_prefill), ("decode", case.decode, case.hf_decode),
                                   ("GRPO step", case.step, case.hf_step)):
            row(name, what, *alternate(ours, theirs, pairs))
        mine, other = (alone("memory", side, name) for side in ("ours", "transformers"))
        print(f"{name:10}{'GRPO step, peak memory':30}{mine / 1e6:>7.0f} MB{other / 1e6:>11.0f} MB{other / mine:>8.2f}")
    print(f"\nstage 1, 4B shape, 400 forget and 400 boundary keys of 9728, on {torch.get_num_threads()} threads: {redirection_seconds('cpu'):.2f} s")
    settings("ours")
    print("\nscaling of our GRPO step, cpu-shape: time / time of the first row")
    scaling(pairs)
    print("\n16 answers of 12 tokens, cpu-shape, prompts of 350 with 300 image tokens: time / time of the first row")
    same_pictures(pairs)
    print("\nunmeasured here: --cuda (2B, 4B and 8B shapes)")


def row(name, what, ours, theirs):
    ratios = [b / a for a, b in zip(ours, theirs)]
    print(f"{name:10}{what:30}{statistics.median(ours):>8.3f} s{statistics.median(theirs):>12.3f} s{statistics.median(ratios):>8.2f}"
          f"   {min(ratios):.2f}-{max(ratios):.2f}")


def settings(side):
    """asru.py's own switches for us, torch's defaults for transformers."""
    if side == "ours":
        asru.set_up_torch()
    else:
        torch.use_deterministic_algorithms(False)


def alternate(ours, theirs, pairs):
    """Times of both, in turn, after one warm-up each."""
    ours(), theirs()
    times = ([], [])
    for _ in range(pairs):
        for side, run, found in zip(("ours", "transformers"), (ours, theirs), times):
            settings(side)
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return times


# ------------------------------------------------------------------------------ what is measured


CPU_SHAPE = {       # between the embedded model and a real one: 300 image tokens, prompts of 350
    "model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], "tie_word_embeddings": True,
    "image_token_id": 6, "video_token_id": 7, "vision_start_token_id": 3, "vision_end_token_id": 4,
    "text_config": {
        "model_type": "qwen3_vl_text", "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096, "rope_theta": 1e4, "tie_word_embeddings": True, "eos_token_id": 2, "pad_token_id": 0,
        "rope_scaling": {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True}},
    "vision_config": {
        "model_type": "qwen3_vl", "depth": 6, "hidden_size": 192, "intermediate_size": 768, "num_heads": 6, "out_hidden_size": 256,
        "num_position_embeddings": 576, "deepstack_visual_indexes": [1, 3], "patch_size": 16, "temporal_patch_size": 2,
        "spatial_merge_size": 2, "in_channels": 3, "hidden_act": "gelu_pytorch_tanh"}}


REAL_SHAPES = {     # hidden, layers, heads, MLP, tied; vision hidden, depth, MLP, DeepStack layers
    "2B": (2048, 28, 16, 6144, True, 1024, 24, 4096, [5, 11, 17]),
    "4B": (2560, 36, 32, 9728, True, 1024, 24, 4096, [5, 11, 17]),
    "8B": (4096, 36, 32, 12288, False, 1152, 27, 4304, [8, 16, 24]),
}


def shape_of(name):
    """config.json's dict of a case that has no checkpoint."""
    if name == "cpu-shape":
        return CPU_SHAPE
    hidden, layers, heads, mlp, tied, vision, depth, vision_mlp, deepstack = REAL_SHAPES[name]
    shape = copy.deepcopy(CPU_SHAPE)
    shape["tie_word_embeddings"] = tied
    shape["text_config"] |= {
        "vocab_size": 151936, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": 128,
        "num_key_value_heads": 8, "intermediate_size": mlp, "rope_theta": 5e6, "tie_word_embeddings": tied,
        "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}}
    shape["vision_config"] |= {
        "hidden_size": vision, "depth": depth, "num_heads": 16, "intermediate_size": vision_mlp, "out_hidden_size": hidden,
        "num_position_embeddings": 2304, "deepstack_visual_indexes": deepstack}
    return shape


class Case:
    """One model, its prompts, and the same work done by us and by transformers."""

    def __init__(self, name, sides=("ours", "transformers"), device="cpu", Q=2, G=8, prompt=350, response=40, pictures=None):
        torch.manual_seed(0)
        self.hf_rows = 8 if device != "cpu" else None           # GRPOTrainer's batch; all at once where memory allows
        self.Q, self.G, self.R = (16, 8, 12) if name == "embedded" else (Q, G, response)       # its answers have 11 on average
        self.temperature = json.loads((EMBEDDED / "asru.json").read_text())["temperature"] if name == "embedded" else 1.5
        if name == "embedded":
            self.model = Qwen3VL.from_pretrained(EMBEDDED, device=device)
            self.batch, self.pool = embedded_prompts(self.model, self.Q)
        else:
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
            with torch.device(device):
                self.model = Qwen3VL(Qwen3VLConfig.from_dict(shape_of(name))).to(dtype).eval()
            self.batch, self.pool = random_prompts(self.model, self.Q, prompt, pictures or self.Q)
        object.__setattr__(self.model.cfg, "eos_token_ids", ())
        self.cfg = asru.Config(group=self.G, max_new_tokens=self.R, temperature=self.temperature, top_p=1.0, prompts=self.Q, minibatch=self.Q,
                               microbatch=self.Q if name == "embedded" else MICROBATCH.get(name, 2))
        self.reward, self.generator = Reward(), torch.Generator(device).manual_seed(0)
        if "transformers" in sides:
            from transformers import Qwen3VLConfig as HfConfig, Qwen3VLForConditionalGeneration
            raw = self.model.cfg.raw
            with torch.device(device):
                self.hf = Qwen3VLForConditionalGeneration(HfConfig(**{k: v for k, v in raw.items() if k != "model_type"}))
            self.hf = self.hf.to(self.model.lm_head.weight.dtype).eval()
            self.hf.load_state_dict(self.model.state_dict())
            b = self.batch
            self.inputs = {"input_ids": b.input_ids, "attention_mask": b.attention_mask, "pixel_values": b.pixel_values,
                           "image_grid_thw": b.image_grid_thw,
                           "mm_token_type_ids": (b.input_ids == self.model.cfg.image_token_id).int()}
        if "ours" not in sides:
            self.model.to("meta")

    def train(self, rank=0):
        """Get ready for `step` and `hf_step`: of the decoder's projections or, with a rank, of adapters to them."""
        self.cfg = replace(self.cfg, lora_rank=rank)
        if not self.model.lm_head.weight.is_meta:
            self.trained = asru.trainable(self.model, self.cfg)
            self.reference = asru.frozen_copy(self.model)
            self.optimizer = asru.optimizer_of(asru.exactly(self.trained), 1e-6, 0.0, self.cfg)
        if hasattr(self, "hf"):
            decoder = self.hf.model.language_model
            self.hf.requires_grad_(False)
            for p in decoder.layers.parameters():
                p.requires_grad_(p.dim() == 2)
            if rank:
                asru.adapt(decoder, rank, seed=0)
            self.hf_trained = [p for p in self.hf.parameters() if p.requires_grad]
            self.hf_reference = asru.frozen_copy(self.hf)       # of what is trained alone; it has no adapters
            self.hf_optimizer = torch.optim.AdamW(self.hf_trained, lr=1e-6, fused=True)
        return self

    # -- ours

    @torch.no_grad()
    def prefill(self):
        self.model(self.batch)

    def decode(self):
        return self.model.generate(self.batch, self.R, self.G, self.temperature, 1.0, self.generator)

    def step(self):
        rows = list(range(self.Q))
        said = asru.sample_groups(self.model, self.pool, rows, self.cfg, self.generator)
        advantage = asru.group_advantage(self.rewarded(said.tokens))
        asru.update(self.model, self.reference, self.optimizer, self.trained, self.pool, said, advantage, rows, self.cfg)

    def rewarded(self, tokens):
        texts = [[" ".join(map(str, row)) for row in group] for group in tokens.tolist()]
        samples = [{"question": "?", "answer": group[0]} for group in texts]
        rewards, _ = self.reward(texts, samples, ["retain"] * self.Q, [None] * self.Q)
        return torch.tensor(rewards)

    # -- transformers, as GRPOTrainer uses it

    @torch.no_grad()
    def hf_prefill(self):
        self.hf.model(**self.inputs)

    @torch.no_grad()
    def hf_decode(self):
        return self.hf.generate(**self.inputs, do_sample=True, temperature=self.temperature, top_k=0, top_p=1.0, num_return_sequences=self.G,
                                max_new_tokens=self.R, min_new_tokens=self.R, eos_token_id=None, pad_token_id=0,
                                suppress_tokens=self.model.cfg.never_sampled)

    def hf_step(self):
        P = self.batch.input_ids.shape[1]
        ids = self.hf_decode()                                              # (Q * G, P + R)
        rewards = self.rewarded(ids[:, P:].view(self.Q, self.G, -1))
        advantage = asru.group_advantage(rewards).flatten()[:, None].to(ids.device)
        repeated = {name: value.repeat_interleave(self.G, 0) for name, value in self.inputs.items()
                    if name in ("attention_mask", "mm_token_type_ids", "image_grid_thw")}
        ones = torch.ones(len(ids), self.R, dtype=torch.long, device=ids.device)
        full = {"input_ids": ids, "attention_mask": torch.cat([repeated["attention_mask"], ones], 1),
                "mm_token_type_ids": torch.cat([repeated["mm_token_type_ids"], 0 * ones.int()], 1),
                "image_grid_thw": repeated["image_grid_thw"]}
        patches = self.inputs["pixel_values"].split(self.inputs["image_grid_thw"].prod(1).tolist())

        def logp(model, rows):
            pixels = torch.cat([patches[row // self.G] for row in rows])
            some = {name: value[rows] for name, value in full.items()}
            logits = model(**some, pixel_values=pixels, logits_to_keep=self.R + 1).logits[:, :-1].float() / self.temperature
            return logits.log_softmax(-1).gather(-1, ids[rows, P:, None])[..., 0]

        for rows in torch.arange(len(ids)).split(self.hf_rows or len(ids)):
            rows = rows.tolist()
            with torch.no_grad():
                reference = logp(self.hf_reference, rows)
            policy = logp(self.hf, rows)
            loss = self.cfg.kl * asru.k3(policy, reference) - asru.clipped_surrogate(policy, policy.detach(), advantage[rows], 0.2)
            (loss.sum() / (len(ids) * self.R)).backward()
        torch.nn.utils.clip_grad_norm_(self.hf_trained, 1.0)
        self.hf_optimizer.step()
        self.hf_optimizer.zero_grad()


def embedded_prompts(model, Q):
    """Q pictured questions of the forget file: (Batch with pixels, Prompts with features)."""
    proc = Processor.from_pretrained(EMBEDDED)
    samples = [s for s in load_samples(ROOT / "data/forget.json") if s.get("image")][:Q]
    chats = [[{"role": "user", "content": [{"type": "image", "image": s["image"]}, {"type": "text", "text": s["question"]}]}] for s in samples]
    return proc(chats), encode(model, proc, samples)


def random_prompts(model, Q, length, number, h=30, w=40):
    """Q prompts of `length` random tokens with a picture of h x w patches each, of which there are `number`."""
    M, shown = h * w // 4, [q % number for q in range(Q)]
    body = torch.randint(10, 8000, (Q, length - M - 2))
    ids = torch.cat([torch.full((Q, 1), 3), torch.full((Q, M), 6), torch.full((Q, 1), 4), body], 1)
    grids = torch.tensor([[1, h, w]] * number)
    pixels = torch.randn(number, h * w, 3 * 2 * 16 * 16).to(model.device)
    with torch.no_grad():
        features = model.encode_images(pixels.flatten(0, 1), grids.to(model.device))
    pictures = {str(q): (grids[q], features[q].cpu()) for q in range(number)}       # as `encode` keeps them
    batch = Batch(ids, torch.ones_like(ids), pixels[shown].flatten(0, 1), grids[shown]).to(model.device)
    return batch, Prompts([{"image": str(q), "question": "?", "answer": "?"} for q in shown], list(ids), pictures)


def redirection_seconds(device):
    """Solving for stage 1's change of one down_proj of the 4B shape, answer tokens left out as in the paper."""
    keys = [torch.randn(400, 9728, dtype=torch.double, device=device) for _ in range(2)]
    shift = torch.randn(400, 2560, dtype=torch.double, device=device)
    return seconds(lambda: asru.solve_redirection([(keys[0], shift)], keys[1:], 1e-4), device)


def seconds(run, device="cpu", times=3):
    """Of one call: the median, after a first one to warm up."""
    wait, found = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None, []
    for _ in range(1 + times):
        start = time.perf_counter()
        run()
        wait()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def scaling(pairs):
    base = dict(G=8, prompt=350, response=40)
    cases = {"G 8, prompt 350, response 40": base, "G doubled": {**base, "G": 16}, "prompt doubled": {**base, "prompt": 700},
             "response doubled": {**base, "response": 80}}
    first = None
    for label, shape in cases.items():
        case = Case("cpu-shape", ("ours",), **shape).train()
        case.step()
        times = []
        for _ in range(pairs):
            start = time.perf_counter()
            case.step()
            times.append(time.perf_counter() - start)
        found = statistics.median(times)
        first = first or found
        print(f"  {label:36}{found:>8.3f} s{found / first:>8.2f}")


def same_pictures(pairs):
    cases = {number: Case("cpu-shape", ("ours",), Q=16, pictures=number) for number in (16, 4, 1)}
    times = {number: [] for number in cases}
    for _ in range(1 + pairs):
        for number, case in cases.items():
            start = time.perf_counter()
            case.model.generate(case.pool.batch(range(16), "cpu"), 12)
            times[number].append(time.perf_counter() - start)
    for number, (_, *found) in times.items():
        ratio = statistics.median(t / first for t, first in zip(found, times[16][1:]))
        print(f"  {f'about {number} picture' + 's' * (number > 1):36}{statistics.median(found):>8.3f} s{ratio:>8.2f}")


# ------------------------------------------------------------------------------ memory


def alone(what, side, case):
    """A measurement in a process of its own."""
    found = subprocess.run([sys.executable, __file__, "--alone", what, side, case], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def peak_memory(side, name):
    """Peak resident memory of one GRPO step over what is held before it, in bytes."""
    torch.set_num_threads(2)
    case = Case(name, (side,)).train()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")                           # start the peak anew
    (case.step if side == "ours" else case.hf_step)()
    peak = next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return peak - before


# ------------------------------------------------------------------------------ memory of real shapes, computed


def ways_to_train(L):
    """What is trained of L layers -> settings."""
    return {"decoder": {}, "decoder, 8 shards": dict(shard=True), "decoder, bf16 states": dict(state_dtype="bfloat16"),
            "decoder, upper half": dict(first_layer=L // 2), "mlp": dict(train="mlp"),
            "mlp, bf16 states": dict(train="mlp", state_dtype="bfloat16"), "LoRA 16": dict(lora_rank=16)}


def memory_table(P=350, G=8, R=50, Q=64, b=2):
    """Peak of stage 2 on one GPU in GiB, bfloat16 weights, by what `optimize_boundary` holds. N parameters, t trained ones.

    weights      2 N; adapters are float32, 4 t
    float32      4 t: the numbers that bfloat16 weights are rounded from; adapters need none
    states       8 t, or 4 t in bfloat16
    reference    2 t: it shares what is not trained; adapters need none
    gradients    2 t, adapters 4 t; the optimizer makes a few at a time float32
    activations  of b prompts of P tokens with G responses of R that begin with nothing alike, T = b (P + G (R - 1)) tokens; a
                   layer keeps T (4 D + 4 F + 4 H d + 3 K d), two bytes each: both norms' input and output; q before and after
                   its norm and turn, attention's output twice; k likewise, v; gate, its silu, up, inner: what autograd's
                   hooks count on a CPU, to 0.5 %. Where an H100 was asked, the total was 1 to 1.5 % more. An upper limit with mlp,
                   and where responses or prompts are shorter. --recompute: T D of every layer, and one layer whole. None of
                   layers below --first-layer. The head's chunk of logits comes on top.
    cache        of Q prompts in a rollout, 2 L K d (P + G (R - 1)) each, what sampling makes of Q G rows of V logits, and
                   the copies that a captured step joins: q, k, v and, where they are less than a sixteenth of the card, gate
                   and up; here of 80 GiB
    Gradients and activations do not meet the rollout: the total has the larger of the two.
    Of 8 shards each process has an eighth of all that goes with t and, but in rollouts, of the weights that are trained;
    a layer that is computed and the next are whole.
    """
    GiB, LOGIT = 2**30, 24          # bytes per logit: about six float32 tensors
    heads = ("weights", "float32", "states", "reference", "gradients", "activations", "recomputed", "cache", "total", "recomputed")
    print(f"{'GiB':26}" + "".join(f"{head:>12}" for head in heads) + "   cards (with --recompute)")
    for name in REAL_SHAPES:
        with torch.device("meta"):
            model = Qwen3VL(Qwen3VLConfig.from_dict(shape_of(name)))
        text = model.cfg.text
        for what, changes in ways_to_train(text.num_hidden_layers).items():
            cfg = asru.Config(**changes)
            N, t = (sum(p.numel() for p in found) for found in (list(model.parameters()), asru.trainable(model, cfg, cfg.first_layer)))
            asru.merge(model)
            full = not cfg.lora_rank
            whole, t = t, t // (8 if cfg.shard else 1)
            D, F, L = text.hidden_size, text.intermediate_size, text.num_hidden_layers
            Hd, Kd = (n * text.head_dim for n in (text.num_attention_heads, text.num_key_value_heads))
            T = b * (P + G * (R - 1))
            layer = 2 * T * (4 * D + 4 * F + 4 * Hd + 3 * Kd)
            head = LOGIT * min(asru.HEAD_CHUNK, b * G * R * text.vocab_size)
            held = [2 * N + 4 * t * (not full), 4 * t * full, (8 if cfg.state_dtype == "float32" else 4) * t, 2 * t * full]
            kept = L - cfg.first_layer          # layers that backward goes through
            activations = kept * layer + head, 2 * kept * T * D + layer + head
            copied = (2 * L * D * (Hd + 2 * Kd), 2 * L * D * 2 * F) if full and not cfg.shard else (0, 0)
            rollout = lambda card: (2 * 2 * L * Kd * Q * (P + G * (R - 1)) + LOGIT * Q * G * text.vocab_size
                                    + copied[0] + copied[1] * (copied[1] < card * GiB / 16))
            gathered = 2 * (whole - t)                      # what a rollout has besides, of which backward has two layers
            held[0] -= gathered
            gradients = (2 if full else 4) * t
            totals = lambda card: [sum(held) + max(gradients + most + 2 * gathered / L, gathered + rollout(card)) for most in activations]
            cards = [[card for card in (24, 48, 80) if totals(card)[i] < 0.92 * card * GiB] for i in range(2)]
            row = [*held, gradients, *activations, rollout(80), *totals(80)]
            row[0] += gathered
            fits = " ".join(f"{card}" if card in cards[0] else f"({card})" for card in cards[1]) or "none"
            print(f"{name:4}{what:22}" + "".join(f"{value / GiB:12.1f}" for value in row) + f"   {fits}")
    print(f"\nbfloat16 weights; prompts of {P} tokens, {G} responses of {R}; --microbatch {b}, rollouts of {Q} prompts; 92 % of a card is used."
          "\n--average adds as much as float32, for adapters hardly anything; --kl 0 needs no reference.")


# ------------------------------------------------------------------------------ one GPU


def cuda_table(names):
    """Real shapes with random weights: what share of the machine each part reaches, and the step against transformers'."""
    if not torch.cuda.is_available():
        sys.exit("bench.py: --cuda needs a GPU, and this machine or this build of torch has none")
    limits = alone("limits", "ours", "cuda")
    rate, bandwidth = limits["rate"], limits["bandwidth"]
    print("{name}, torch {torch}: {:.0f} TFLOP/s bf16, {:.0f} GB/s, both measured".format(rate / 1e12, bandwidth / 1e9, **limits))
    print(f"stage 1, 4B shape, 400 forget and 400 boundary keys: {limits['stage 1']:.3f} s\n")
    print(f"{'shape':8}{'prefill':>10}{'decode':>10}{'update':>10}{'step':>10}{'transformers':>14}{'ratio':>8}{'memory':>10}{'transformers':>14}")
    for name in names:
        mine, other = alone("cuda", "ours", name), alone("cuda", "transformers", name)
        cell = lambda text, found, *of: format(of[0] * found[of[1]], of[2]) + text if of[1] in found else "no memory"
        ratio = f"{other['step'] / mine['step']:.2f}" if "step" in mine and "step" in other else "-"
        print(f"{name:8}{cell(' %', mine, 100 / rate, 'prefill', '.0f'):>10}{cell(' %', mine, 100 / bandwidth, 'decode', '.0f'):>10}"
              f"{cell(' %', mine, 100 / rate, 'update', '.0f'):>10}{cell(' s', mine, 1, 'step', '.2f'):>10}"
              f"{cell(' s', other, 1, 'step', '.2f'):>14}{ratio:>8}{cell(' GB', mine, 1e-9, 'memory', '.1f'):>10}"
              f"{cell(' GB', other, 1e-9, 'memory', '.1f'):>14}")
    print("\nprefill (of pictures seen before), update: share of the matrix rate; decode, 64 rows: share of the bandwidth; step: 16 prompts of"
          "\n350 tokens, G 8, 50 new tokens. Prompts in a microbatch: " + ", ".join(f"{n} of {name}" for name, n in MICROBATCH.items())
          + "; 8B through adapters of rank 16;\ntransformers: 8 rows at a time, as GRPOTrainer has it by default. Medians of three, transformers' of two, after one to warm up.")


def machine_limits(side, device, n=8192):
    """What this GPU does at best: bf16 matrix products in FLOP/s, copying in bytes/s; and stage 1 in seconds."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    many = lambda run: lambda: [run() for _ in range(20)]
    b = torch.empty(2**30, dtype=torch.uint8, device=device)
    return {"name": torch.cuda.get_device_name(), "torch": torch.__version__, "rate": 20 * 2 * n**3 / seconds(many(lambda: a @ a), device),
            "bandwidth": 20 * 2 * 2**30 / seconds(many(b.clone), device), "stage 1": redirection_seconds(device)}


def cuda_side(side, name, device="cuda", Q=16, P=350, R=50):
    """FLOP/s of prefill and update, bytes/s of decoding, seconds and peak bytes of a step; what lacks memory is absent."""
    found, rank = {}, ADAPTED.get(name, 0)
    try:
        case = Case(name, (side,), device, Q=Q, prompt=P, response=R)
        weights, head = sum(p.numel() for p in projections(case.model)), case.model.lm_head.weight.numel()
        if side == "ours":                                                  # a token's products are two FLOP with each weight
            batch = case.pool.batch(range(Q), device)
            with torch.no_grad():
                found["prefill"] = 2 * weights * Q * P / seconds(lambda: case.model(batch), device)
            found["decode"] = decode_rate(case, weights + head, device)
        case.train(rank)
        if side == "ours":
            rows = list(range(Q))
            said = asru.sample_groups(case.model, case.pool, rows, case.cfg, case.generator)
            advantage = torch.randn(Q, case.G)
            update = lambda: asru.update(case.model, case.reference, case.optimizer, case.trained, case.pool, said, advantage, rows,
                                         case.cfg)
            body, spoken = 2 * weights * Q * (P + case.G * (R - 1)), 2 * head * Q * case.G * R
            passes = 3 if rank else 4       # reference 1, policy 1, backward 2, of which a frozen weight needs one
            found["update"] = (passes * body + 3 * spoken) / seconds(update, device)
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        found["step"] = seconds(case.step if side == "ours" else case.hf_step, device, times=3 if side == "ours" else 2)
        found["memory"] = torch.cuda.max_memory_allocated() if device != "cpu" else 0
    except torch.OutOfMemoryError:
        pass
    return found


ADAPTED = {"8B": 16}        # trained through adapters of this rank: whole, its states alone would fill a card of 80 GB
MICROBATCH = {"2B": 16, "4B": 4, "8B": 8}       # what such a card holds: 4B measured, the others by `memory_table`


def decode_rate(case, weights, device, rows=64):
    """Bytes that a decoding step must read, weights and cache, per second."""
    text, Q = case.model.cfg.text, rows // case.G
    batch = case.pool.batch(range(Q), device)
    P, R = batch.input_ids.shape[1], case.R
    generate = lambda n: seconds(lambda: case.model.generate(batch, n, case.G, 1.5, 1.0, case.generator), device, times=5)
    step = (generate(R) - generate(2)) / (R - 2)                            # two tokens: with the capture of a step
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * Q * (P + case.G * R / 2)
    return case.model.lm_head.weight.element_size() * (weights + cache) / step


if __name__ == "__main__":
    main()
