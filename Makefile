# The commands of the project. `make demo` and `make test` set up all they need, in $(VENV).
#   PYTHON   the interpreter to start from; a torch >= 2.11 that it can import is reused
#   GPU      options of `make gpu`: GPU="--minutes 60 --resume", GPU=--dry-run
#   VENV     where the environment goes; empty (`make VENV= demo`): use PYTHON as it is, install nothing

PYTHON ?= python3
VENV ?= .venv

ifeq ($(strip $(VENV)),)
RUN := $(PYTHON)
installed =
else
RUN := $(VENV)/bin/python
# One stamp per extra of pyproject.toml: while it is newer than the requirements, pip does not run.
installed = $(VENV)/.installed-$(1)
endif
# Never installs: the environment where there is one, else PYTHON.
RUN_AS_IS := $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON))

.PHONY: help app demo train test test-app test-all check docs gallery bench rehearse gpu gpu-cache clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 20

demo: $(call installed,demo) ## 64 faces by plain PyTorch and by cnnfast: differences, times, out/*.png
	$(RUN) -m cnnfast demo --output out

app: $(call installed,app) ## the image tasks as a page in the browser, on this machine alone
	$(RUN) -m cnnfast app --open

train: $(call installed,demo) ## a GAN on 1,797 digits, about ten minutes on two cores: samples, losses, checkpoint in out/gan
	$(RUN) -m cnnfast train gan

test: $(call installed,test) ## the tests, ten to fifteen minutes on two cores
	$(RUN) tests/run.py

test-app: $(call installed,test) $(call installed,app) ## the tests of the page (it needs gradio), one minute
	$(RUN) -m pytest -q -p no:cacheprovider tests/tasks/test_app.py tests/tasks/test_page.py tests/tasks/test_browser.py

test-all: $(call installed,test) ## every test: all architectures and dtypes
	$(RUN) tests/run.py --all

check: $(call installed,dev) ## ruff, mypy, and that imports go one way
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy cnnfast
	$(RUN) -c "import sys; from importlinter.cli import lint_imports_command as lint; sys.exit(lint())" --no-cache

docs: $(call installed,dev) ## the API reference, made from the docstrings: out/docs/cnnfast.html
	$(RUN) -m pdoc -o out/docs cnnfast

gallery: $(call installed,images) ## what the image tasks make, on one picture: out/gallery.jpg
	$(RUN) -m cnnfast gallery

bench: $(call installed,bench) ## benchmarks against eager, torch.compile, onnxruntime and OpenVINO
	$(RUN) -m benchmarks

rehearse: $(call installed,bench) ## every case's plan and machine code on six GPU architectures, without a GPU
	$(RUN) -m benchmarks.rehearse

gpu: ## on a machine with an NVIDIA GPU: kernel tests, tuning, times against cuDNN, in ten minutes; installs nothing
	$(RUN_AS_IS) -m benchmarks.gpu $(GPU)

# The versions of the machine with the GPU, whatever is installed here: a cache is found by the same Triton for the same Python only.
gpu-cache: ## without a GPU: a compile cache for `make gpu GPU="--cache out/gpu-cache"` on one (torch 2.11, triton 3.6; ARCH=90)
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip --disable-pip-version-check install -q torch==2.11.0 triton==3.6.0 filelock numpy platformdirs tabulate tqdm xxhash
	.venv-gpu/bin/python -m benchmarks.gpu --compile --arch $(or $(ARCH),90) --cache out/gpu-cache --minutes 60

clean: ## caches and build files; the environment and the weights' cache stay
	rm -rf build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

ifneq ($(strip $(VENV)),)
requirements := pyproject.toml constraints.txt .ci/environment.py

$(VENV)/.installed-%: $(requirements)
	$(PYTHON) .ci/environment.py $(VENV) $*
	@touch $@

# ttsem runs the Triton kernels on a CPU. It declares a newer Python than it needs, and the tests do without it.
$(VENV)/.installed-test: $(requirements)
	$(PYTHON) .ci/environment.py $(VENV) test
	-$(RUN) -m pip --disable-pip-version-check install --no-deps --ignore-requires-python ttsem==0.1.0
	@touch $@
endif
