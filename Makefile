# Each target does its own set-up in .venv, once: the stamps are renewed when a requirements file changes.
#
#   make train    train a base on Shakespeare            (settings: make train MAX_ITERS=500, or .env)
#   make adapt    adapt it to the First Folio with LoRA
#   make test     lint, then the whole test suite
#   make soak     faults at every operation, rot at every byte, a line of 1 GB, a stop at every moment: docs/reliability.md
#                 (about half an hour, 10 GB of memory, 5 GB of disk)
#   make tiny     nanoGPT's CPU recipe on tinyshakespeare, three seeds (about 4 minutes on 2 cores)
#   make gap      how much of full fine-tuning's gain LoRA reaches, three seeds, 500 steps and 1,200 (half an hour to an hour)
#   make pretrained   SmolLM2-135M from the hub end to end: adapted, talked to, merged, loaded in transformers and PEFT
#                 (about 6 minutes; another model, or a folder: make pretrained PRETRAINED=gpt2)
#   make speller  the Folio speller: a base, an adapter that rewrites modern lines in First Folio spelling (three seeds,
#                 10 minutes each), and the verdict on all 4,462 held-out pairs (45 minutes on 2 cores)
#   make speller-pretrained   the same on SmolLM2-135M (three and a half hours of one core of a shared machine)
#   make guide    the runs and pictures of docs/zero-to-hero/ (10 minutes of one core), and whether its pages show what
#                 their code prints
#   make three-texts   the README's picture: a base, adapters of the First Folio, of Milton and of Python's documentation, and
#                 what each makes of one prompt (about 3 minutes)
#   make two-machines   two torchrun agents of two processes each, on two network namespaces of this machine where the
#                 system allows that, else on loopback: the same weights as one process (a quarter of a minute)
#   make browser-tests   reports and the playground in chromium, the latter as a person uses it; needs the system's:
#                 apt-get install chromium chromium-driver
#   make onnx-tests   ONNX graphs in onnxruntime, of export.py and of the template (fetches 120 MB into .venv; a minute)
#   make tune-tests   tune.py with Optuna, and TRACK with TensorBoard and W&B offline (fetches 60 MB into .venv; a minute)

PYTHON ?= python3
VENV := .venv
PRETRAINED ?= HuggingFaceTB/SmolLM2-135M-Instruct
TOUR := pretrained-folio
BIN := $(VENV)/bin

.PHONY: train adapt test soak settings tiny gap pretrained speller speller-pretrained guide three-texts two-machines onnx-tests browser-tests tune-tests clean

train: $(VENV)/run.stamp
	$(BIN)/python training.py

adapt: $(VENV)/run.stamp
	USE_LORA=True $(BIN)/python training.py

test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

soak: $(VENV)/test.stamp
	SOAK=1 timeout 3600 $(BIN)/python -m pytest -n 0 -s -m "" tests/runtime/test_faults.py tests/runtime/test_rot.py \
		tests/data/test_hostile_text.py tests/models/test_compiled.py tests/jobs/test_exact_resume.py \
		tests/runtime/test_settings_fuzz.py tests/runtime/test_settings_together.py tests/runtime/test_names_fuzz.py \
		tests/processes/test_endings.py tests/processes/test_fifty_endings.py

settings: $(VENV)/run.stamp
	$(BIN)/python -m runtime.settings.config

tiny: $(VENV)/run.stamp
	$(BIN)/python -m benchmarks.tinyshakespeare

gap: $(VENV)/run.stamp
	$(BIN)/python -m benchmarks.lora_gap

pretrained: $(VENV)/test.stamp
	$(BIN)/python training.py --use-lora --base $(PRETRAINED) --run-name $(TOUR) --max-iters 60 --block-size 512
	$(BIN)/python generate.py --run $(TOUR) --prompt "Enter Hamlet." --max-new-tokens 60
	$(BIN)/python generate.py --run $(TOUR) --adapter none --prompt "Enter Hamlet." --max-new-tokens 60
	echo "What is the capital of France?" | $(BIN)/python generate.py --run $(TOUR) --chat --greedy --max-new-tokens 40
	$(BIN)/python adapters.py merge $(TOUR) --out $(TOUR)-merged
	$(BIN)/python -m benchmarks.elsewhere --run $(TOUR) --merged $(TOUR)-merged

speller: $(VENV)/test.stamp
	$(BIN)/python training.py --run-name speller-base --tokenizer bpe --vocab-size 2048 --n-layer 6
	for seed in 1337 1338 1339; do \
		$(BIN)/python training.py --use-lora --base speller-base --dataset folio-pairs --template line --optimizer muon \
			--lora-rank 64 --learning-rate 6e-3 --batch-size 64 --max-iters 3800 --eval-interval 1000 \
			--save-interval 1000 --patience 0 --seed $$seed --run-name speller-$$seed && \
		$(BIN)/python evaluate.py speller-$$seed --limit 0 --max-new-tokens 80 || exit 1; \
	done

speller-pretrained: $(VENV)/test.stamp
	$(BIN)/python training.py --use-lora --base $(PRETRAINED) --dataset folio-pairs --template line --epochs 1 \
		--learning-rate 1e-3 --eval-interval 1000 --save-interval 250 --patience 0 --run-name speller-pretrained
	$(BIN)/python evaluate.py speller-pretrained --limit 0 --max-new-tokens 60

guide: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.guide_runs --record
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.guide --write

three-texts: $(VENV)/test.stamp
	mkdir -p data/cache
	$(BIN)/python -c 'from pydoc_data.topics import topics; print("\n\n".join(topics.values()).encode("ascii", "ignore").decode())' \
		> data/cache/pydoc.txt
	$(BIN)/python training.py
	for text in folio milton data/cache/pydoc.txt; do $(BIN)/python training.py --use-lora --dataset $$text || exit 1; done
	$(BIN)/python -m benchmarks.three_texts --adapters lora-folio-r8 lora-milton-r8 lora-pydoc-r8 \
		--out docs/pictures/three-texts.png

two-machines: $(VENV)/run.stamp
	$(BIN)/python -m benchmarks.two_machines

onnx-tests: $(VENV)/test.stamp
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-onnx.txt
	$(BIN)/python -m pytest -n 0 tests/pretrained/test_export_onnx.py tests/commands/test_templates.py -k "onnx or exported"

browser-tests: $(VENV)/test.stamp
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-browser.txt
	$(BIN)/python -m pytest -n 0 -rs -m browser

tune-tests: $(VENV)/test.stamp
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-tune.txt -r requirements-tracking.txt
	$(BIN)/python -m pytest -n 0 tests/commands/test_tune.py tests/commands/test_tracking.py

$(VENV)/run.stamp: requirements.txt | $(VENV)/venv.stamp
	@echo "Setting up $(VENV), once: torch and a few small packages"
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/test.stamp: requirements-test.txt requirements.txt | $(VENV)/venv.stamp
	@echo "Setting up $(VENV) for the tests, once: torch, peft, transformers and a few small packages"
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-test.txt
	touch $@ $(VENV)/run.stamp

$(VENV)/venv.stamp:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis
