# Each target does its own set-up in .venv, once: the stamps are renewed when a requirements file changes.
#
#   make train    train a base on Shakespeare            (settings: make train MAX_ITERS=500, or .env)
#   make adapt    adapt it to the First Folio with LoRA
#   make test     lint, then the whole test suite
#   make soak     faults at every operation, rot at every byte, a line of 1 GB, a stop at every moment: docs/reliability.md
#                 (about half an hour, 10 GB of memory, 5 GB of disk)
#   make tiny     nanoGPT's CPU recipe on tinyshakespeare, three seeds (about 4 minutes on 2 cores)
#   make gap      how much of full fine-tuning's gain LoRA reaches, three seeds (about 15 minutes)
#   make pretrained   SmolLM2-135M from the hub end to end: adapted, talked to, merged, loaded in transformers and PEFT
#                 (about 6 minutes; another model, or a folder: make pretrained PRETRAINED=gpt2)

PYTHON ?= python3
VENV := .venv
PRETRAINED ?= HuggingFaceTB/SmolLM2-135M-Instruct
TOUR := pretrained-folio
BIN := $(VENV)/bin

.PHONY: train adapt test soak settings tiny gap pretrained clean

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
		tests/runtime/test_settings_fuzz.py tests/runtime/test_settings_together.py tests/runtime/test_names_fuzz.py

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
