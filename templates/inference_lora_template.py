"""Text from a base with its adapter and without it: python templates/inference_lora_template.py --run lora-folio-r8"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that Python finds the repository's own modules
from jobs.generating.load import load
from lora.attach import adapter_names, using
from lora.merge import cached_weights
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from runtime.errors import UserError


@torch.inference_mode()  # no graph for a backward pass that never comes
def sample(model: BigramLanguageModelLoRA, ids: list[int], count: int, temperature: float, top_k: int, seed: int):
    """Yield the ids that follow the prompt's: each is drawn from what the model says after all that come before it."""
    generator, T, ids = torch.Generator().manual_seed(seed), model.config.max_positions, list(ids)
    for _ in range(count):
        # There are only T positions. When they are full, the window moves on by half of them, as generate.py has it: a
        # cache of keys and values, which is what makes that fast, has to begin anew whenever the window moves.
        start = math.ceil(max(0, len(ids) - T) / (T // 2)) * (T // 2)
        logits_V = model(torch.tensor([ids[start:]]))[0][0, -1]  # only the last position says what comes next
        logits_V = logits_V / temperature  # below 1 likely tokens become likelier, above 1 all become more alike
        if top_k:  # each of the many unlikely tokens has little chance, but all of them together are often drawn from
            logits_V[logits_V < logits_V.topk(min(top_k, len(logits_V))).values[-1]] = -math.inf
        # A draw by these chances: the largest of chance / Exp(1). The seed decides it, so the text can be had again.
        chances_V = logits_V.softmax(-1)
        ids.append(int((chances_V / torch.empty_like(chances_V).exponential_(generator=generator)).argmax()))
        yield ids[-1]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints-dir", default="checkpoints")
    defaults = {"run": "template-lora", "prompt": "O Romeo", "max-new-tokens": 200}
    for name, value in (defaults | {"temperature": 0.8, "top-k": 0, "seed": 1337}).items():
        parser.add_argument(f"--{name}", default=value, type=type(value), help=f"default: {value}")
    args = parser.parse_args(argv)
    if args.temperature <= 0:
        raise UserError("--temperature must be above 0; generate.py --greedy takes the likeliest token every time")

    # The base is read once, and the adapter's A and B are put beside its weights, which stay as they are. So one base
    # in memory can serve many adapters, or none: `using` says which of them count, here the one that there is.
    model, tokenizer = load(args.run, args.checkpoints_dir)
    if not (names := adapter_names(model)):
        raise UserError(f"{args.run} has no adapter; generate.py writes text from a base alone")
    prompt = tokenizer.encode(args.prompt or "\n")  # there must be a token to begin with
    how = (args.max_new_tokens, args.temperature, args.top_k, args.seed)
    for title, chosen in (("with the adapter", names), ("without it", [])):
        # W + (alpha / rank) B A is computed once and kept, not again for each token: an adapter then costs no time.
        with using(model, *chosen), cached_weights(model):
            print(f"--- {title}\n{args.prompt}{tokenizer.decode(list(sample(model, prompt, *how)))}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
