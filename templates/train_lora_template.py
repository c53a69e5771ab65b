"""Adapt a trained base with LoRA in a plain loop: python templates/train_lora_template.py --base base-shakespeare"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that Python finds the repository's own modules
from jobs.generating.load import load
from lora.adapter import Adapter
from lora.peft_format import save_adapter
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from runtime.errors import UserError
from runtime.storage.tensors import fingerprint

PEAK, B_RATIO = 4e-3, 4.0  # the learning rate of A, and how many times faster B learns


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints-dir", default="checkpoints", type=Path)
    defaults = {"base": "base-shakespeare", "text": "data/cache/folio-v1/train.txt", "out": "template-lora"}
    for name, value in (defaults | {"rank": 8, "steps": 100, "batch-size": 16, "seed": 1337}).items():
        parser.add_argument(f"--{name}", default=value, type=type(value), help=f"default: {value}")
    args = parser.parse_args(argv)
    folder = args.checkpoints_dir / args.out
    if folder.exists():
        raise UserError(f"{folder} is there already, and may have taken hours to train: choose another --out")
    if not Path(args.text).is_file():
        raise UserError(
            f"there is no {args.text}: `python training.py --use-lora` fetches it; or pass another with --text"
        )
    base, tokenizer = load(args.base, args.checkpoints_dir)
    tokens = torch.tensor(tokenizer.encode(Path(args.text).read_text("utf-8-sig")))
    # The end of the text is held out. Training loss always falls; only text that it never saw tells what was learned.
    c, cut = base.config, int(0.9 * len(tokens))
    T, train, held_out = c.max_positions, tokens[:cut], tokens[cut:]
    if len(held_out) <= T:
        raise UserError(f"{args.text} is too short: a tenth of it must have more than {T} tokens")
    n = min(64, (len(held_out) - 1) // T)
    held_x, held_y = held_out[: n * T].view(n, T), held_out[1 : n * T + 1].view(n, T)

    # The base's shape, with an adapter: each linear computes W x + (alpha / rank) B A x. W is frozen, so it needs no
    # gradient and no optimizer state. A starts random and B at zero, so that training starts from exactly the base.
    # Copies of the embeddings train too; the base's own stay as they are.
    torch.manual_seed(args.seed)
    shape = {name: getattr(c, name) for name in ("n_embd", "n_head", "n_layer", "bias", "positions")}
    model = BigramLanguageModelLoRA(
        c.vocab_size, block_size=T, **shape, use_lora=True, lora_rank=args.rank, lora_alpha=16.0
    )
    if model.load_state_dict(base.state_dict(), strict=False).unexpected_keys:  # the adapter's own keys are missing
        raise UserError(f"{args.base} has another architecture, or an adapter of its own; training.py may help")

    # While B is zero, no gradient reaches A: B learns faster (LoRA+). Weight decay would pull A and B to zero, and so
    # the model back to its base; at these few steps that is not wanted.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    slow, fast = ([p for name, p in trained.items() if name.endswith(".B") == is_B] for is_B in (False, True))
    rows = [{"params": slow, "ratio": 1.0}, {"params": fast, "ratio": B_RATIO}]
    optimizer = torch.optim.AdamW(rows, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    with torch.no_grad():
        before = model(held_x, held_y)[1].item()
    for step in range(args.steps):
        # A batch is a function of seed and step. There is no generator to save, so a run can be resumed exactly.
        random = np.random.Philox(key=args.seed, counter=step << 64).random_raw(args.batch_size)
        starts = torch.from_numpy((random % np.uint64(len(train) - T)).astype(np.int64))
        windows = train[starts[:, None] + torch.arange(T + 1)]
        # Adam's first steps have full length however small the gradient, so they start short; then a cosine to zero.
        warmup = min(20, args.steps // 5)
        falling = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK * ((step + 1) / (warmup + 1) if step < warmup else falling) * group["ratio"]
        loss = model(windows[:, :-1], windows[:, 1:])[1]  # the target of each token is the one that follows it
        if not loss.isfinite():
            raise UserError(f"the loss is {loss.item()} at step {step + 1}: a lower learning rate may help")
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*slow, *fast], 1.0)  # so that one odd batch cannot undo many good ones
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step + 1} of {args.steps}: loss {loss.item():.4f}")
    with torch.no_grad():
        print(f"held-out loss: {before:.4f} before, {model(held_x, held_y)[1].item():.4f} after")

    # The file has A, B and the trained embeddings, and the fingerprint of the base's weights: on other weights of the
    # same shape the adapter would load as well, and write nonsense. run.json makes the folder a run, so it comes last.
    about = json.loads((args.checkpoints_dir / args.base / "run.json").read_text("utf-8"))
    told = {"test_mode": about["settings"]["test_mode"], "dataset": str(Path(args.text).resolve())}
    sha256 = fingerprint(base.state_dict())
    run = {"kind": "lora", "identity": "template", "settings": told, "base": {"run": args.base, "sha256": sha256}}
    known = {"base": args.base, "base_sha256": sha256, "tokenizer_sha256": tokenizer.sha256}
    save_adapter(folder / "adapter", Adapter.from_model(model, **known))
    (folder / "run.json").write_text(json.dumps(run), "utf-8")
    print(f"saved {folder}: {sum(map(torch.numel, trained.values())):,} numbers; next:")
    print(f"python templates/inference_lora_template.py --run {args.out} --checkpoints-dir {args.checkpoints_dir}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError, UnicodeError) as error:
        sys.exit(f"error: {error}")
