# `make serve` and `make test` need Python 3.10 or later and a C++ compiler; the rest they fetch into .venv.
# Another interpreter: make test PYTHON=python3.12.   Flags for the server: make serve ARGS="--port 9000".

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
MARK ?= not slow
BIN = $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help serve test test-all lint fix wheel clean

help:  ## say what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */\1|/' | awk -F'|' '{ printf "  make %-9s %s\n", $$1, $$2 }'

serve: $(VENV)/.demo  ## install what is needed, and serve the embedded small model on 127.0.0.1:8000
	@exec $(BIN)/stillhouse serve $(ARGS)

test: $(VENV)/.dev  ## install what is needed, and run the tests (make test MARK= runs the slow ones too)
	@$(BIN)/python -m pytest -m "$(MARK)" $(ARGS)

test-all: $(VENV)/.all  ## PyTorch, MLX and others' clients too, and the slow tests: real models, whole servers
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev  ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright

fix: $(VENV)/.dev  ## put style right, as far as a program can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

wheel: $(VENV)/.dev  ## build dist/stillhouse-*.whl
	@rm -rf build dist
	@$(BIN)/python -m build --wheel --installer pip . >$(VENV)/wheel.log 2>&1 || { cat $(VENV)/wheel.log >&2; exit 1; }
	@ls dist/*.whl

clean:  ## delete the virtual environment, and what the tools left behind
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: newer than pyproject.toml means installed.

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@$(call install,.[demo])
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@$(call install,.[demo$(comma)dev])
	@touch $(VENV)/.demo $@

$(VENV)/.all: pyproject.toml | $(BIN)/python
	@$(call install,.[demo$(comma)dev$(comma)torch$(comma)mlx$(comma)train$(comma)clients])
	@touch $(VENV)/.demo $(VENV)/.dev $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo 'error: $(PYTHON) is missing or older than Python 3.10; say which one to take: make PYTHON=python3.12' >&2; exit 2; }
	@echo 'making a virtual environment in $(VENV)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'error: no virtual environment; on Debian and Ubuntu: apt install python3-venv' >&2; exit 2; }
	@$@ -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (21, 3))' || $@ -m pip install -q --upgrade pip

comma := ,

# llama-cpp-python comes as source. Its compilation is silent for minutes, so a line every 15 s says that it is alive.
define install
set -e; \
if ! $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llama_cpp") is None)'; then \
  echo 'int main() { return 0; }' | "$${CXX:-c++}" -x c++ -fsyntax-only - 2>/dev/null || \
    { echo 'error: no C++ compiler; Debian, Ubuntu: apt install build-essential; macOS: xcode-select --install' >&2; exit 2; }; \
  echo 'installing $(1): the first time compiles llama.cpp, about 6 minutes on 2 cores'; \
else \
  echo 'installing $(1)'; \
fi; \
shell=$$$$; waited=0; \
(while sleep 15 >/dev/null 2>&1 && kill -0 $$shell 2>/dev/null; do waited=$$((waited + 15)); echo "  still installing, $$waited s"; done) & \
ticker=$$!; trap 'kill $$ticker 2>/dev/null || true' EXIT; trap 'exit 130' INT TERM; \
$(BIN)/python -m pip install -qq --disable-pip-version-check -e '$(1)'
endef
