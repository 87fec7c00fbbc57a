# Every target but help and clean makes .venv first, from a clean clone too.
# The demo's model, text and options can be set: make demo DEMO_STEPS=8

DEMO_MODEL := examples/gpt2-books
DEMO_DATA := examples/data/books-sample.txt
DEMO_OUT := build/demo
DEMO_STEPS := 4
DEMO_EMIT := onnx,netlist,energy
# Fine-tuning of the demo: enough to see what it is good for, in under three minutes, half of them for compiling. Layer by layer first, then end to end.
DEMO_TEXT := examples/gpt2-books/calibration.txt
DEMO_BLOCKWISE := 150000
DEMO_TOKENS := 50000
# Options for pytest, such as: make test PYTEST_ARGS="-k netlist -x"
PYTEST_ARGS :=

BIN := .venv/bin
STAMP := .venv/.installed
# -qq: errors only
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
# One thread per test: the tensors are small, and sums then have one order. No test needs a network.
# Two workers; the tests of a file stay together, because they share captured models.
WORKERS := -n 2 --dist loadfile
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help demo test lint check golden clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## Compile the reference GPT-2 to a spiking network, fine-tune it, evaluate both against the original
	$(BIN)/ntc compile $(DEMO_MODEL) -o $(DEMO_OUT) --steps $(DEMO_STEPS) --emit $(DEMO_EMIT) --overwrite
	$(BIN)/ntc evaluate $(DEMO_OUT) --data $(DEMO_DATA) --against $(DEMO_MODEL)
	$(BIN)/ntc finetune $(DEMO_OUT) --data $(DEMO_TEXT) -o $(DEMO_OUT)-tuned --overwrite \
		--blockwise-tokens $(DEMO_BLOCKWISE) --max-tokens $(DEMO_TOKENS) --lr 5e-4
	$(BIN)/ntc evaluate $(DEMO_OUT)-tuned --data $(DEMO_DATA) --against $(DEMO_MODEL)

test: $(STAMP) ## Run the tests, without the slow ones
	$(TEST_ENV) $(BIN)/python -m pytest $(WORKERS) -m "not slow" $(PYTEST_ARGS)

lint: $(STAMP) ## Run ruff, mypy and import-linter, all three whatever they find
	@failed=0; for command in "ruff check --output-format concise" mypy "lint-imports --no-logo"; do \
		echo "$(BIN)/$$command"; $(BIN)/$$command || failed=1; done; exit $$failed

check: lint test ## Run the linters, then the tests

golden: $(STAMP) ## Rewrite the golden files in tests/golden; read the diff before you commit it
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow" --update-golden $(PYTEST_ARGS)

clean: ## Remove the demo's output and the caches; .venv and the rest of build stay
	rm -rf $(DEMO_OUT) $(DEMO_OUT)-tuned $(DEMO_OUT)-tuned.work dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, so that a failing download of the one large package shows at once. The build tools are installed
# here and not by pip's build isolation, which would not hold them to constraints.txt.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into .venv (minutes the first time)"
	@test -x $(BIN)/python || { python3.11 -c "" 2>/dev/null && python3.11 -m venv .venv; } || python3 -m venv .venv
	@$(PIP) torch
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable ".[dev]"
	@$(PIP) --no-deps neurobench
	@touch $@
