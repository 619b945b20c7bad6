# make demo   install into .venv and show what the package does
# make test   lint, then all tests with the newest transformers and those of tests/hf with the oldest supported one
# make lint   ruff: rules and format; mypy: types
#
# PYTHON=python3.12 make ...   uses another interpreter (3.11 or newer) for .venv

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install -qq --disable-pip-version-check
WORKERS ?= 2

OLDEST := $(CURDIR)/$(VENV)/oldest
OLDEST_TRANSFORMERS := $(shell sed -n 's/^transformers==//p' requirements-oldest.txt)
# One thread a worker: the workers share the cores, and tiny models gain nothing from more. The timeout ends hangs.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --timeout 900

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(RUN) -m benchmarks.demo

test: lint $(VENV)/.installed-oldest
	$(PYTEST)
	PYTHONPATH="$(OLDEST)" $(RUN) -c "from transformers import __version__ as found; \
	    raise SystemExit(None if found == '$(OLDEST_TRANSFORMERS)' else 'expected the oldest transformers, got ' + found)"
	PYTHONPATH="$(OLDEST)" $(PYTEST) -o cache_dir=.pytest_cache/oldest tests/hf

lint: $(VENV)/.installed-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV)

# Each file below marks a finished step, so that an interrupted one is done again and a finished one is not.

$(VENV)/.created:
	@$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    'Python 3.11 or newer is needed; $(PYTHON) is ' + sys.version.split()[0] + '. Try: make PYTHON=python3.12')"
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing the package and what it needs (PyTorch is large: this can take some minutes) ..."
	$(INSTALL) -c constraints.txt -e '.[hf]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing what the tests need ..."
	$(INSTALL) -c constraints.txt -e '.[hf,train,r1,plot,test]'
	@# A CUDA build of torch brings the Triton it needs; a CPU build brings none, and the kernels' tests want one.
	@if [ "$$(uname)" = Linux ]; then $(RUN) -c "import triton" 2>/dev/null || $(INSTALL) triton==3.9.0; fi
	@touch $@

$(VENV)/.installed-oldest: $(VENV)/.installed-test requirements-oldest.txt
	@echo "Installing transformers $(OLDEST_TRANSFORMERS) beside the newest ..."
	rm -rf "$(OLDEST)"
	$(INSTALL) --no-deps --target "$(OLDEST)" -r requirements-oldest.txt
	@touch $@
