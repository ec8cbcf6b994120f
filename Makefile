# make demo        set up, then everything on real text: tokenizer, data, models, DDK, and equal sampling to compare with
# make test        set up, then lint, types and tests
# make test-long   the tests that make test leaves out
# make test-full   make test, the long tests and 50 real faults; writes the results to docs/results/
# make docs-check  check every command, key and link of the pages, and that docs/configuration.md is up to date
#                  (python -m tools.bench.config_reference writes it)
# Set-up is done once, in .venv. PYTHON=python3.12 names another interpreter for it.

PYTHON ?= python3
BIN := .venv/bin
# torch looks for ninja on PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Modules are byte-compiled when they are first imported, not all 40,000 at the installation.
unexport PYTHONDONTWRITEBYTECODE

INSTALLED := .venv/.installed
READY := .venv/.ready
DATA := runs/demo-data

.PHONY: setup demo clean-demo test test-long test-full lint docs-check
.NOTPARALLEL:

setup: $(READY)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) tools/check_setup.py
	@echo "set-up: installing into .venv: 3.3 GB are downloaded, 7 GB installed"
	@$(PYTHON) tools/install.py
	@touch $@

# DeepSpeed would compile this when a run first starts, while the ranks wait. Meanwhile the modules of a run are
# imported for the first time, which byte-compiles them: later starts take half the time.
$(READY): $(INSTALLED)
	@echo "set-up: compiling DeepSpeed's shared-memory communication, half a minute"
	@$(BIN)/python -c 'import ddk_ds.train.setup, ddk_ds.data.prepare' & imports=$$!; \
	TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv/torch_extensions \
	  $(BIN)/python -c 'from ddk_ds.engine.runtime import load_communication; load_communication()' && wait $$imports
	@touch $@

# A step of the demo runs if its output is missing. An interrupted training run continues from its newest checkpoint.
demo: $(READY) runs/demo/summary.json
	@$(BIN)/python tools/summary.py runs/demo runs/demo-equal

$(DATA)/tokenizer/tokenizer.json: | $(READY)
	$(BIN)/python tools/train_tokenizer.py --recipe configs/data/demo.yaml --vocab-size 4096 --out $(@D)

$(DATA)/shards/domains.json: | $(DATA)/tokenizer/tokenizer.json
	$(BIN)/python tools/prepare_data.py --recipe configs/data/demo.yaml --tokenizer $(DATA)/tokenizer \
	  --out $(@D) --sequence-length 256 --validation-samples 40

$(DATA)/%-init/model.safetensors: | $(DATA)/tokenizer/tokenizer.json
	$(BIN)/python tools/init_model.py --config configs/models/demo_$*.json --tokenizer $(DATA)/tokenizer \
	  --out $(@D) --seed 1

runs/demo-teacher/summary.json: | $(DATA)/shards/domains.json $(DATA)/teacher-init/model.safetensors
	$(BIN)/deepspeed --quiet --num_gpus 2 launch/distill.py --config configs/demo_teacher.yaml

runs/demo-student/summary.json: | $(DATA)/student-init/model.safetensors runs/demo-teacher/summary.json
	$(BIN)/deepspeed --quiet --num_gpus 2 launch/distill.py --config configs/demo_student.yaml

runs/demo-equal/summary.json: | runs/demo-student/summary.json
	$(BIN)/deepspeed --quiet --num_gpus 2 launch/distill.py --config configs/demo_equal.yaml

runs/demo/summary.json: | runs/demo-equal/summary.json
	$(BIN)/deepspeed --quiet --num_gpus 2 launch/distill.py --config configs/demo.yaml

clean-demo:
	rm -rf $(DATA) runs/demo-teacher runs/demo-student runs/demo-equal runs/demo

# Two workers: one for the tests that start several processes, the other for the rest (tests/sets.py).
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadscope

test-long: $(READY)
	$(BIN)/python -m pytest -m long --result=docs/results/test_full.md

test-full: test test-long
	$(BIN)/python -m tools.bench.fault_campaign --runs 50 --seed 5 --json docs/results/fault_campaign.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs-check: $(READY)
	$(BIN)/python -m tools.bench.docs_check
	$(BIN)/python -m tools.bench.config_reference --check
