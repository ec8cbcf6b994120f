# make demo        set up, then everything on real text in 3 minutes: tokenizer, data, models, DDK and two baselines
# make test        set up, then lint, types and tests
# make test-long   the tests that make test leaves out
# make test-full   make test, the long tests and 50 real faults; writes the results to docs/results/
# make test-transformers4  the tests of models and tokenizers with transformers 4.57.6, in an environment over .venv
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
OLDER := .venv/transformers4
DATA := runs/demo-data
SEED ?= 1
DDK := $(BIN)/ddk
# Put what a command prints into a file, and show its end if the command fails.
in_file = > $(1) 2>&1 || { code=$$?; tail -n 20 $(1); echo "demo: the whole output is in $(1)"; exit $$code; }

.PHONY: setup demo clean-demo test test-long test-transformers4 test-full lint docs-check

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

# A step of the demo runs if its output is missing; an interrupted run continues from its newest checkpoint. Seconds are
# those of two idle cores. Two steps run at a time: the second of a pair writes to a file what it prints.
demo: $(READY)
	@$(MAKE) --no-print-directory -j2 runs/demo/report/report.html
	@$(DDK) summary runs/demo runs/demo-equal runs/demo-kd
	@echo "demo: equal sampling, and distillation with domains by size (the paper's KD), had the same models and tokens."
	@echo "DDK is for the largest ratio; docs/results/demo.md shows three seeds, and what DDK does not improve. Next:"
	@echo
	@echo "    open $(CURDIR)/runs/demo/report/report.html in a browser"
	@echo "    $(DDK) generate runs/demo --temperature 0.8 --prompt '#include <'"
	@echo "    read docs/guide.md: the same with your own text and models"

$(DATA)/tokenizer/tokenizer.json: | $(READY)
	@echo "demo [1/6]: a tokenizer from text of the installed packages, 5 s"
	$(DDK) tokenizer --recipe configs/data/demo.yaml --vocab-size 2048 --domain-bytes 300000 \
	  --out $(@D)

$(DATA)/shards/domains.json: | $(DATA)/tokenizer/tokenizer.json
	@echo "demo [2/6]: the text of eight domains as shards, and two models with random weights, 20 s"
	$(DDK) prepare --recipe configs/data/demo.yaml --tokenizer $(DATA)/tokenizer \
	  --out $(@D) --sequence-length 128 --validation-samples 64

$(DATA)/%-init/model.safetensors: | $(DATA)/tokenizer/tokenizer.json
	$(DDK) init --config configs/models/demo_$*.json --tokenizer $(DATA)/tokenizer \
	  --out $(@D) --seed $(SEED)

runs/demo-teacher/summary.json: | $(DATA)/shards/domains.json $(DATA)/teacher-init/model.safetensors
	@echo "demo [3/6]: the teacher on one core, 65 s; the starting student, without cpp and json, on the other"
	OMP_NUM_THREADS=1 $(DDK) distill --ranks 1 --config configs/demo_teacher.yaml seed=$(SEED)

runs/demo-student/summary.json: | $(DATA)/shards/domains.json $(DATA)/student-init/model.safetensors
	OMP_NUM_THREADS=1 $(DDK) distill --ranks 1 --config configs/demo_student.yaml \
	  seed=$(SEED) $(call in_file,runs/demo-student.log)

runs/demo-equal/summary.json: | runs/demo-teacher/summary.json runs/demo-student/summary.json
	@echo "demo [4/6]: to compare with, equal sampling on one core, 20 s; domains by size on the other"
	OMP_NUM_THREADS=1 $(DDK) distill --ranks 1 --config configs/demo.yaml seed=$(SEED) \
	  name=demo-equal method=ddk_equal

runs/demo-kd/summary.json: | runs/demo-teacher/summary.json runs/demo-student/summary.json
	OMP_NUM_THREADS=1 $(DDK) distill --ranks 1 --config configs/demo.yaml \
	  seed=$(SEED) name=demo-kd method=kd $(call in_file,runs/demo-kd.log)

runs/demo/summary.json: | runs/demo-equal/summary.json runs/demo-kd/summary.json
	@echo "demo [5/6]: DDK on two ranks, 25 s"
	$(DDK) distill --ranks 2 --config configs/demo.yaml seed=$(SEED)

runs/demo/report/report.html: | runs/demo/summary.json
	@echo "demo [6/6]: the report page, 5 s"
	$(DDK) report runs/demo runs/demo-equal runs/demo-kd

clean-demo:
	rm -rf $(DATA) $(foreach run,demo demo-teacher demo-student demo-equal demo-kd,runs/$(run) runs/$(run).log)

# tests/sets.py says how the tests are shared among the workers. Of the long tests many wait: a third worker fits in.
# Lint has one process: the tests run beside it.
test: $(READY)
	@make --no-print-directory lint & lint=$$!; $(BIN)/python -m pytest -n 2 --dist loadscope; tests=$$?; \
	wait $$lint && exit $$tests

test-long: $(READY)
	$(BIN)/python -m pytest -n 3 --dist loadscope -m long --result=docs/results/test_full.md

# pip's transformers, with the rest of .venv under it.
$(OLDER)/.installed: $(READY)
	@rm -rf $(OLDER)
	@$(BIN)/python -m venv $(OLDER)
	@$(OLDER)/bin/python -m pip install --quiet --no-deps transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"), "$(CURDIR)", sep="\n")' \
	  > $$($(OLDER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	@touch $@

test-transformers4: $(OLDER)/.installed
	TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv/torch_extensions $(OLDER)/bin/python -m pytest -n 2 --dist loadscope \
	  tests/unit/engine tests/unit/data/test_data_text.py tests/unit/data/test_data_tokenizer.py \
	  tests/unit/test_make_student.py tests/unit/test_model_families.py tests/dist/test_loading.py

test-full: test test-long test-transformers4
	$(BIN)/python -m tools.bench.fault_campaign --runs 50 --seed 5 --json docs/results/fault_campaign.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs-check: $(READY)
	$(BIN)/python -m tools.bench.docs_check
	$(BIN)/python -m tools.bench.config_reference --check
