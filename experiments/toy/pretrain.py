"""Pretrain the tiny Llama from scratch on generated text: `python -m experiments.toy.pretrain`.

Writes a byte-level BPE tokenizer of 512 tokens with single digits, bf16 safetensors and
a data card. Everything follows from the seed and the number of steps; the loss can
still differ in its last digits between processors and numbers of threads. A run that
was killed goes on with `--resume`.
"""
import argparse
import itertools
import math
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.toy.corpus import MIX, documents
from experiments.toy.minigsm import problems
from qlora_lib.base.devices import resolve_dtype
from qlora_lib.base.endings import ending
from qlora_lib.base.files import read_json, read_tensors, write_json_atomic
from qlora_lib.base.folders import atomic_folder
from qlora_lib.base.paths import given_path
from qlora_lib.base.ranges import ANY_SEED, COUNT

VOCABULARY = 512
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
# (batch, context): one batch in four is long enough for a few-shot prompt.
SHAPES = ((16, 256), (16, 256), (16, 256), (6, 640))
LEARNING_RATE, WEIGHT_DECAY, WARMUP = 2e-3, 0.1, 200
STEPS, SEED, CHECKPOINT_EVERY = 4500, 0, 250
SAMPLE = 20_000  # documents that stand for the whole corpus


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 512 tokens; every digit is a token of its own.

    It is trained on the corpus and on train problems in the prompt's format, so that
    the words of that format are cheap; the model is trained on the corpus only.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    raw.decoder = decoders.ByteLevel()
    texts = [text for _, text in itertools.islice(documents(seed), SAMPLE)]
    texts += [f"Question: {entry['question']}\nAnswer:\n"
              + re.sub("<<.*?>>", "", entry["answer"])
              for entry in problems("train", n=2_000)]
    raw.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, BOS, EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, bos_token=BOS,
                                   eos_token=EOS)


def build_model(seed: int) -> LlamaForCausalLM:
    """A Llama of about 3 million parameters with random weights, fp32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
        rope_theta=10_000.0, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2))


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Endless (batch, context) token ids in `SHAPES`' turn: documents between bos and eos.

    A document may attend to the ones before it, which are unrelated to it.
    """
    texts = (text for _, text in documents(seed))
    buffer: list[int] = []
    for batch, context in itertools.cycle(SHAPES):
        while len(buffer) < batch * context:
            chunk = list(itertools.islice(texts, 64))
            for ids in tokenizer(chunk, add_special_tokens=False)["input_ids"]:
                buffer += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        # (batch * context,) -> (batch, context)
        yield torch.tensor(buffer[:batch * context]).view(batch, context)
        buffer = buffer[batch * context:]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to 2% of the peak."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def save_checkpoint(folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW,
                    tokenizer: PreTrainedTokenizerFast, state: dict) -> None:
    """Write model, tokenizer, AdamW's moments and `state` to a folder, whole or not at all."""
    moments = {f"{name}.{key}": optimizer.state[parameter][key]
               for name, parameter in model.named_parameters()
               for key in ("exp_avg", "exp_avg_sq", "step")}
    with atomic_folder(folder, "state.json") as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        save_file(moments, beside / "optimizer.safetensors")
        write_json_atomic(beside / "state.json", state)


def load_checkpoint(folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW,
                    asked: dict) -> dict:
    """Fill model and optimizer from `folder`; returns its state.

    Raises FileNotFoundError without a checkpoint, ValueError when it is of another run.
    """
    path = folder / "state.json"
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint in {folder}; run without --resume")
    state = read_json(path)
    if {key: state.get(key) for key in asked} != asked:
        raise ValueError(f"the checkpoint in {folder} is of a run with "
                         f"{ {key: state.get(key) for key in asked} }, this one has {asked}; "
                         "give the same options or run without --resume")
    model.load_state_dict(read_tensors(folder / "model.safetensors"), strict=False)
    moments = read_tensors(folder / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {key: moments[f"{name}.{key}"]
                                      for key in ("exp_avg", "exp_avg_sq", "step")}
    return state


def pretrain(out: Path, checkpoint: Path, steps: int = STEPS, seed: int = SEED,
             resume: bool = False) -> float:
    """Train for `steps` and write the bf16 model to `out`; returns the last mean loss."""
    tokenizer, model = build_tokenizer(seed), build_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95),
                                  weight_decay=WEIGHT_DECAY)
    asked = {"steps": steps, "seed": seed}
    state = {**asked, "done": 0, "tokens": 0, "seconds": 0.0, "loss": 0.0}
    if resume:
        state = load_checkpoint(checkpoint, model, optimizer, asked)
    stream = itertools.islice(batches(tokenizer, seed), state["done"], steps)
    bf16 = resolve_dtype("auto", "cpu") == torch.bfloat16
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {steps} steps, seed {seed}, "
          f"{'bf16' if bf16 else 'fp32'}, {torch.get_num_threads()} threads", flush=True)

    model.train()
    start = time.perf_counter() - state["seconds"]
    tokens, since = 0, time.perf_counter()
    for step, ids in enumerate(stream, state["done"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # A running mean over about 100 steps, kept in the state so that it survives a kill.
        recent = loss.item() if step == 0 else 0.99 * state["loss"] + 0.01 * loss.item()
        tokens += ids.numel()
        state.update(done=step + 1, tokens=state["tokens"] + ids.numel(), loss=recent,
                     seconds=time.perf_counter() - start)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1:5d}  loss {recent:.4f}  "
                  f"{tokens / (time.perf_counter() - since):,.0f} tokens/s  "
                  f"{state['seconds']:.0f} s", flush=True)
            tokens, since = 0, time.perf_counter()
        if (step + 1) % CHECKPOINT_EVERY == 0:
            save_checkpoint(checkpoint, model, optimizer, tokenizer, state)

    unseen = separate_unseen(model, tokenizer, seed)
    print(f"{unseen} tokens of the vocabulary do not occur in the corpus", flush=True)
    with atomic_folder(out, "config.json") as beside:
        model.to(torch.bfloat16).save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        (beside / "README.md").write_text(data_card(state, parameters, bf16), encoding="utf-8")
    return state["loss"]


@torch.no_grad()
def separate_unseen(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast,
                    seed: int) -> int:
    """Give each token that the corpus never holds a direction of its own; returns their count.

    Training only ever pushes these rows down, all in one direction: "####" and a "The" that
    begins a line end up with a cosine of 0.9996, and no adapter on the linears can tell them
    apart, because the tied embedding is also the output layer. They keep what they share,
    which keeps them unlikely, and get a random part twice as long as a trained row.
    """
    weight = model.get_input_embeddings().weight  # (vocabulary, hidden)
    texts = [text for _, text in itertools.islice(documents(seed), SAMPLE)]
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    used.update(*tokenizer(texts, add_special_tokens=False)["input_ids"])
    seen = torch.zeros(len(weight), dtype=torch.bool)  # (vocabulary,)
    seen[list(used)] = True
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    noise = torch.nn.functional.normalize(noise, dim=1) * (2 * weight[seen].norm(dim=1).mean())
    weight[~seen] += noise[~seen]
    return int((~seen).sum())


def data_card(state: dict, parameters: int, bf16: bool) -> str:
    """The README of the model's folder, with the figures of the run that made it."""
    shares = textwrap.fill(", ".join(f"{name.replace('_', ' ')} {weight}%"
                                     for name, weight in MIX.items()), 88)
    return f"""# tiny-llama

A LlamaForCausalLM of {parameters:,} parameters (hidden 256, intermediate 768, 4 layers,
4 heads of 64, tied embeddings, context 1024) with a byte-level BPE of {VOCABULARY} tokens in
which every digit is a token. Trained from scratch; weights are stored in bf16.

## What it was trained on
Text generated by `experiments/toy/corpus.py`, by share of documents:
{shares}.
The questions take their numbers from mini-GSM's train split only.

## What it has never seen
A chain of two steps for one problem, a question followed by its answer, GSM8K's format
(`Question:`, `Answer:`, `####`, calculator notes), a label on a review or a summary of a
story. The tokenizer, not the model, was also trained on train problems in the prompt's
format. No text was written by people or taken from elsewhere, so the model knows nothing
of the world and should be used for this course only.

## How it was made
`make pretrain`, that is
`python -m experiments.toy.pretrain --steps {state['steps']} --seed {state['seed']}`

| | |
|---|---|
| steps, tokens | {state['steps']:,}, {state['tokens']:,} |
| optimizer | AdamW, peak learning rate {LEARNING_RATE}, {WARMUP} steps of warm-up, cosine |
| arithmetic | {'bf16 autocast' if bf16 else 'fp32'}, fp32 master weights |
| loss, mean over about the last 100 steps | {state['loss']:.4f} |
| minutes, threads | {state['seconds'] / 60:.1f}, {torch.get_num_threads()} |

Rows of the tied embedding whose token never occurs in the corpus drift to one common
direction. After training each gets a random part of its own (`separate_unseen`).

Another processor or number of threads gives other last digits, hence other weights of
the same quality. Licence: MIT.
"""


def main() -> None:
    """Command line of `pretrain`."""
    parser = argparse.ArgumentParser(description="pretrain the bundled tiny model from scratch")
    parser.add_argument("--steps", type=COUNT, default=STEPS)
    parser.add_argument("--seed", type=ANY_SEED, default=SEED)
    parser.add_argument("--out", type=given_path, default=Path("data/tiny-llama"))
    parser.add_argument("--checkpoint", type=given_path, default=Path("build/pretrain"))
    parser.add_argument("--threads", type=COUNT, default=None)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    pretrain(options.out, options.checkpoint, options.steps, options.seed, options.resume)


if __name__ == "__main__":
    sys.exit(ending(main))
