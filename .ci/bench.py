"""Speed and memory against transformers' Qwen3-VL, same weights, prompts and number of tokens: one table, ratios from one run.

    python .ci/bench.py              the embedded model and a CPU shape (300 image tokens, prompt 350, response 40, G 8)
    python .ci/bench.py --quick      two pairs instead of five

A ratio is the median over alternating pairs of (transformers' time / ours). transformers does what TRL's GRPOTrainer asks of it:
`generate` with every prompt repeated G times, then full rows of prompt and response through the policy (with gradient) and through
the reference, the head at response positions, the same loss and optimizer. End tokens are switched off, so that both write as many.
"""
import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import asru                                                                 # noqa: E402
from eval import Prompts, encode, load_samples                              # noqa: E402
from model_qwen3vl import Batch, Processor, Qwen3VL, Qwen3VLConfig          # noqa: E402
from reward import Reward                                                   # noqa: E402

EMBEDDED = ROOT / "data/tiny-qwen3vl"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two pairs instead of five")
    parser.add_argument("--memory", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        return print(peak_memory(*args.memory))
    pairs = 2 if args.quick else 5
    torch.set_num_threads(2)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratio = transformers / ours, median of {pairs} pairs (range)\n")
    print(f"{'case':10}{'what':30}{'ours':>10}{'transformers':>14}{'ratio':>8}   range")
    for name in ("embedded", "cpu-shape"):
        case = Case(name)
        for what, ours, theirs in (("prefill", case.prefill, case.hf_prefill), ("decode", case.decode, case.hf_decode),
                                   ("GRPO step", case.step, case.hf_step)):
            row(name, what, *alternate(ours, theirs, pairs))
        mine, other = (measure_memory(side, name) for side in ("ours", "transformers"))
        print(f"{name:10}{'GRPO step, peak memory':30}{mine / 1e6:>7.0f} MB{other / 1e6:>11.0f} MB{other / mine:>8.2f}")
    print("\nscaling of our GRPO step, cpu-shape: time / time of the row above it")
    scaling(pairs)


def row(name, what, ours, theirs):
    ratios = [b / a for a, b in zip(ours, theirs)]
    print(f"{name:10}{what:30}{statistics.median(ours):>8.3f} s{statistics.median(theirs):>12.3f} s{statistics.median(ratios):>8.2f}"
          f"   {min(ratios):.2f}-{max(ratios):.2f}")


def alternate(ours, theirs, pairs):
    """Times of both, in turn, after one warm-up each."""
    ours(), theirs()
    times = ([], [])
    for _ in range(pairs):
        for run, found in zip((ours, theirs), times):
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


class Case:
    """One model, its prompts, and the same work done by us and by transformers."""

    def __init__(self, name, sides=("ours", "transformers"), G=8, prompt=350, response=40):
        torch.manual_seed(0)
        if name == "embedded":
            self.Q, self.G, self.R = 16, 8, 20
            folder = EMBEDDED
        else:
            self.Q, self.G, self.R = 2, G, response
            self.dir = tempfile.TemporaryDirectory()
            folder = Path(self.dir.name)
            Qwen3VL(Qwen3VLConfig.from_dict(CPU_SHAPE)).save_pretrained(folder)
        self.model = Qwen3VL.from_pretrained(folder)
        self.batch, self.pool = embedded_prompts(self.model, self.Q) if name == "embedded" else random_prompts(self.model, self.Q, prompt)
        object.__setattr__(self.model.cfg, "eos_token_ids", ())
        self.cfg = asru.Config(group=self.G, max_new_tokens=self.R, top_p=1.0, prompts=self.Q, minibatch=self.Q, microbatch=self.Q)
        self.reward, self.generator = Reward(), torch.Generator().manual_seed(0)
        if "ours" in sides:
            self.model.requires_grad_(False)
            self.trained = [p.requires_grad_(True) for p in self.model.text.layers.parameters() if p.dim() == 2]
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6)
            self.reference = asru.frozen_copy(self.model)
        if "transformers" in sides:
            from transformers import Qwen3VLForConditionalGeneration
            self.hf = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
            self.hf.requires_grad_(False)
            self.hf_reference = copy.deepcopy(self.hf)
            trained = [p.requires_grad_(True) for p in self.hf.model.language_model.layers.parameters() if p.dim() == 2]
            self.hf_optimizer = torch.optim.AdamW(trained, lr=1e-6)
            b = self.batch
            self.inputs = {"input_ids": b.input_ids, "attention_mask": b.attention_mask, "pixel_values": b.pixel_values,
                           "image_grid_thw": b.image_grid_thw,
                           "mm_token_type_ids": (b.input_ids == self.model.cfg.image_token_id).int()}

    # -- ours

    @torch.no_grad()
    def prefill(self):
        self.model(self.batch)

    def decode(self):
        return self.model.generate(self.batch, self.R, self.G, 1.5, 1.0, self.generator)

    def step(self):
        rows = list(range(self.Q))
        tokens, keep = asru.sample_groups(self.model, self.pool, rows, self.cfg, self.generator)
        rewards = self.rewarded(tokens)
        advantage = asru.group_advantage(rewards)
        asru.update(self.model, self.reference, self.optimizer, self.trained, self.pool, rows, tokens, keep, advantage, rows, self.cfg)

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
        return self.hf.generate(**self.inputs, do_sample=True, temperature=1.5, top_k=0, top_p=1.0, num_return_sequences=self.G,
                                max_new_tokens=self.R, min_new_tokens=self.R, eos_token_id=None, pad_token_id=0,
                                suppress_tokens=self.model.cfg.never_sampled)

    def hf_step(self):
        P = self.batch.input_ids.shape[1]
        ids = self.hf_decode()                                              # (Q * G, P + R)
        rewards = self.rewarded(ids[:, P:].view(self.Q, self.G, -1))
        advantage = asru.group_advantage(rewards).flatten()[:, None]
        repeated = {name: value.repeat_interleave(self.G, 0) for name, value in self.inputs.items()
                    if name in ("attention_mask", "mm_token_type_ids")}
        ones = torch.ones(len(ids), self.R, dtype=torch.long)
        rows = self.inputs["image_grid_thw"].prod(1).tolist()
        full = {"input_ids": ids, "attention_mask": torch.cat([repeated["attention_mask"], ones], 1),
                "mm_token_type_ids": torch.cat([repeated["mm_token_type_ids"], 0 * ones.int()], 1),
                "pixel_values": torch.cat([part.repeat(self.G, 1) for part in self.inputs["pixel_values"].split(rows)]),
                "image_grid_thw": self.inputs["image_grid_thw"].repeat_interleave(self.G, 0)}

        def logp(model):
            logits = model(**full, logits_to_keep=self.R + 1).logits[:, :-1].float() / 1.5
            return logits.log_softmax(-1).gather(-1, ids[:, P:, None])[..., 0]

        with torch.no_grad():
            reference = logp(self.hf_reference)
        policy = logp(self.hf)
        loss = (self.cfg.kl * asru.k3(policy, reference) - asru.clipped_surrogate(policy, policy.detach(), advantage, 0.2)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.hf.parameters(), 1.0)
        self.hf_optimizer.step()
        self.hf_optimizer.zero_grad()


def embedded_prompts(model, Q):
    """Q pictured questions of the forget file: (Batch with pixels, Prompts with features)."""
    proc = Processor.from_pretrained(EMBEDDED)
    samples = [s for s in load_samples(ROOT / "data/forget.json") if s.get("image")][:Q]
    chats = [[{"role": "user", "content": [{"type": "image", "image": s["image"]}, {"type": "text", "text": s["question"]}]}] for s in samples]
    return proc(chats), encode(model, proc, samples)


def random_prompts(model, Q, length, h=30, w=40):
    """Q prompts of `length` random tokens with one picture of h x w patches each."""
    M = h * w // 4
    body = torch.randint(10, 8000, (Q, length - M - 2))
    ids = torch.cat([torch.full((Q, 1), 3), torch.full((Q, M), 6), torch.full((Q, 1), 4), body], 1)
    grids = torch.tensor([[1, h, w]] * Q)
    batch = Batch(ids, torch.ones_like(ids), torch.randn(Q * h * w, 3 * 2 * 16 * 16), grids)
    with torch.no_grad():
        features = model.encode_images(batch.pixel_values.to(model.device, model.lm_head.weight.dtype), grids)
    pictures = {str(q): (grids[q], features[q]) for q in range(Q)}
    return batch, Prompts([{"image": str(q), "question": "?", "answer": "?"} for q in range(Q)], list(ids), pictures)


def scaling(pairs):
    base = dict(G=8, prompt=350, response=40)
    cases = {"G 8, prompt 350, response 40": base, "G doubled": {**base, "G": 16}, "prompt doubled": {**base, "prompt": 700},
             "response doubled": {**base, "response": 80}}
    first = None
    for label, shape in cases.items():
        case = Case("cpu-shape", ("ours",), **shape)
        case.step()
        times = []
        for _ in range(pairs):
            start = time.perf_counter()
            case.step()
            times.append(time.perf_counter() - start)
        found = statistics.median(times)
        first = first or found
        print(f"  {label:36}{found:>8.3f} s{found / first:>8.2f}")


# ------------------------------------------------------------------------------ memory


def measure_memory(side, case):
    """Peak resident memory of one GRPO step over what is held before it, in bytes, in a process of its own."""
    found = subprocess.run([sys.executable, __file__, "--memory", side, case], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[-1])


def peak_memory(side, name):
    torch.set_num_threads(2)
    case = Case(name, (side,))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")                           # start the peak anew
    (case.step if side == "ours" else case.hf_step)()
    peak = next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return peak - before


if __name__ == "__main__":
    main()
