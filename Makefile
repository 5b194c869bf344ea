# make help lists the targets; `make run-all` on a fresh clone sets everything up by itself.

PY           ?= python3
VENV         ?= .venv
PIP_ARGS     ?=
SYSTEM_TORCH ?=
# Else every process would compile again what it imports, which kernels and tests do by the dozen.
unexport PYTHONDONTWRITEBYTECODE
# Not ?=: what happens to stand in somebody's environment must not change what is run.
PROFILE      := tiny
NB           :=
P            :=
PORT         := 8888
DIR          :=
JOBS         :=
GRID         :=
EXECUTED     :=
TRIES        := 300
SEED         := 0

PYTHON := $(VENV)/bin/python
comma  := ,
TOOLS  := $(PYTHON) -m course.tools
READY  := $(VENV)/.ready
PEERS  := $(VENV)-interop

.DEFAULT_GOAL := help
.PHONY: help setup run-all rehearsal test unit long fuzz families mutants lowest newest interop nbval ui pictures store normal solved html \
        student grade badges lab kernel pretrain experiments bench benchmark-gpu finetune evaluate clean

help: ## this list
	@echo "make TARGET [NAME=value ...]; below each target, the same without make"
	@echo "(python stands for .venv/bin/python)"
	@awk -F ' *## *' '/^[a-z-]+:.*##/ { sub(":.*", "", $$1); \
	    printf "\n  %-12s %s\n", $$1, $$2; if ($$3) printf "  %-12s %s\n", "", $$3 }' $(MAKEFILE_LIST)
	@echo
	@echo "PROFILE=tiny|smollm2|llama2-7b   NB=\"01 02\" these notebooks only   P=\"bits=3\" other parameters"
	@echo "PY=python3.12   PIP_ARGS=\"...\" for pip, e.g. the index of PyTorch's CPU wheels"
	@echo "JOBS=2 notebooks or tests side by side, one thread each; as many as there are cores and memory for"
	@echo "GRID=1 each slider of a run draws its whole grid, so that make test need not run the notebooks again"
	@echo "SYSTEM_TORCH=1 keep the torch that this machine's Python already has   PORT=8888 of make lab"

# A new environment in $(1), with a pip that knows the formats of today.
define new_venv
$(PY) -m venv $(if $(SYSTEM_TORCH),--system-site-packages) $(1)
@$(1)/bin/python -c 'import pip; v = pip.__version__; exit(tuple(map(int, v.split(".")[:2])) < (23, 1))' \
    || $(1)/bin/python -m pip install --upgrade 'pip>=23.1' \
    || { echo "pip 23.1 or newer is needed in $(1), and it could not be upgraded" >&2; exit 1; }
endef

# The environment $(1) sees the packages of $(VENV) below its own.
define put_below
@$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    > "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
endef

# pip install $(2) into $(1). pip unpacks for minutes without a word: every 10 seconds, how much
# is there.
define install
@( while sleep 10 >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do \
    echo "      ... $$(ls -d $(1)/lib/python3*/site-packages/*.dist-info | wc -l) packages," \
        "$$(du -sm $(1) | cut -f1) MB in $(1)"; done ) & \
trap "kill $$! 2>/dev/null" EXIT; \
$(1)/bin/python -m pip --disable-pip-version-check install $(PIP_ARGS) $(2)
endef

.PHONY: doctor
doctor: ## what this machine has and lacks for the course, with the remedies ## python -m qlora_lib doctor
	@$(or $(wildcard $(PYTHON)),$(PY)) -m qlora_lib doctor

setup: $(READY) ## install into .venv, once ## python3 -m venv .venv; python -m pip install -r requirements.txt; python -m pip install --no-deps -e .

$(READY): requirements.txt pyproject.toml setup.py
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, %s is %s: make setup PY=python3.12" % (sys.executable, sys.version.split()[0]))'
	@$(PY) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PY) cannot make virtual environments: install its venv package (Debian, Ubuntu: apt-get install python3-venv), then make setup" >&2; exit 1; }
	@echo "Setting up $(VENV), once. To be downloaded: about 400 MB of packages, and torch, which is"
	@echo "190 MB for CPU only (3 GB on disk, all in all), but on Linux several GB with the CUDA"
	@echo "libraries that pip takes by default."
	@echo "CPU only: stop with Ctrl-C, then make setup PIP_ARGS=\"--extra-index-url <PyTorch's CPU index>\""
	@echo "(its Get started page names it). Torch is already here: make setup SYSTEM_TORCH=1."
	@echo "[1/4] a new environment"
	$(call new_venv,$(VENV))
ifneq ($(SYSTEM_TORCH),)
	@$(PYTHON) -c 'import torch; v = torch.__version__; exit(tuple(map(int, v.split(".")[:2])) < (2, 11) and "torch %s is too old." % v)' \
	    || { echo "SYSTEM_TORCH=1 needs a torch of 2.11 or newer that $(PY) can import. Either" >&2; \
	         echo "  make setup                              installs torch into $(VENV); this machine's stays as it is" >&2; \
	         echo "  make setup PIP_ARGS=\"--extra-index-url ...\"   the same, of the index for your driver's CUDA, which" >&2; \
	         echo "                                          nvidia-smi shows (PyTorch's Get started page has the indexes)" >&2; \
	         echo "  make setup SYSTEM_TORCH=1 PY=...        takes the torch of another Python of this machine" >&2; exit 1; }
endif
	@$(if $(SYSTEM_TORCH),sed -e '/^torch==/d' -e 's/^triton==[^;]*/triton/' requirements.txt,cat requirements.txt) > $(VENV)/requirements.txt
	@$(if $(SYSTEM_TORCH),$(PYTHON) -c 'import torch; print("torch==" + torch.__version__)',grep '^torch==' requirements.txt) > $(VENV)/torch.txt
	@echo "[2/4] $$(cat $(VENV)/torch.txt)$(if $(SYSTEM_TORCH),$(comma) which is here already)"
ifeq ($(SYSTEM_TORCH),)
	$(call install,$(VENV),-c $(VENV)/requirements.txt -r $(VENV)/torch.txt)
endif
	@echo "[3/4] transformers, JupyterLab and what else the notebooks and the tests need"
	$(call install,$(VENV),-r $(VENV)/requirements.txt -c $(VENV)/torch.txt)
	@echo "[4/4] this repository itself, where it lies"
	$(call install,$(VENV),--no-deps -e .)
	@touch $@
	@echo "Set up."

$(PEERS)/.ready: $(READY) tests/requirements-interop.txt
	@$(PYTHON) -c 'import os, shutil, sysconfig; cc = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]; exit(shutil.which(cc) is None)' \
	    || { echo "gptqmodel needs a C compiler, for its pypcre, which has no wheels: install one" >&2; \
	         echo "(Debian, Ubuntu: apt-get install gcc libpcre2-dev), then make interop" >&2; exit 1; }
	@echo "Setting up $(PEERS), once: the libraries to compare with. What $(VENV) has, it takes from there."
	$(call new_venv,$(PEERS))
	$(call put_below,$(PEERS))
	@grep -v -e '^numpy==' -e '^torch==' -e '^triton' $(VENV)/requirements.txt > $(PEERS)/requirements.txt
	$(call install,$(PEERS),-r tests/requirements-interop.txt -c $(PEERS)/requirements.txt \
	    -c $(VENV)/torch.txt)
	$(call install,$(PEERS),--no-deps -e .)
	@touch $@

$(VENV)/.browser: $(READY) tests/browser/requirements.txt
	$(call install,$(VENV),-r tests/browser/requirements.txt)
	@touch $@

# glibc gives large blocks of memory back to the system when they are freed, and gets them anew page
# by page: up to a tenth of a training step on a CPU. Notebooks that are run keep it; what measures
# memory or speed finds it as it is. Elsewhere the two names say nothing.
run-all nbval store solved ui pictures html: export MALLOC_MMAP_THRESHOLD_ := 1073741824
run-all nbval store solved ui pictures html: export MALLOC_TRIM_THRESHOLD_ := 4294967296

run-all: $(READY) ## run every notebook into outputs/ and compare its numbers ## python -m course.tools run [--profile tiny] [--parameters "bits=3"] [--jobs 2] [01 02]
	$(TOOLS) run --profile $(PROFILE) --parameters "$(P)$(if $(filter-out tiny,$(PROFILE)),$(if $(MODEL), weights_from='$(MODEL)')$(if $(GSM8K_DIR), data_from='$(GSM8K_DIR)'))" \
	    $(if $(JOBS),--jobs $(JOBS)) $(if $(GRID),--grid) $(NB)

rehearsal: $(READY) ## 04 and 05 as they run LLaMA-2-7B, on a small random model in its folder layout
	$(PYTHON) -m tests.support.rehearsal

test: ## unit tests, long tests, then nbval (after make run-all GRID=1, of what that has executed)
	$(MAKE) --no-print-directory unit
	$(MAKE) --no-print-directory long
	$(MAKE) --no-print-directory nbval EXECUTED=1

# Side by side with one thread each: threads of two processes would wait for each other.
# (conftest.py says how many -n auto are.)
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n $(or $(JOBS),auto)

# These load no plugin but xdist: every process would wait for nbval's imports. A file's tests stay
# together, so that what they share is made once. xdist would begin with the files of most tests;
# as they are named here, the long ones come first, and short ones fill the end.
BY_FILE := PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(SIDE_BY_SIDE) -p xdist --dist loadfile --no-loadscope-reorder

unit: $(READY) ## unit tests, and a few tries of each fuzzer ## python -m pytest -q -m "not long" tests/unit tests/fuzz
	$(BY_FILE) -m "not long" tests/unit tests/fuzz

long: $(READY) ## tests of over a second: processes and kernels started and killed, a wheel, a record, small trainings ## python -m pytest -q -m long tests/unit tests/long tests/fuzz
	$(BY_FILE) -m long tests/long tests/fuzz tests/unit

fuzz: $(READY) ## files damaged, commands killed, disks full, input bad: TRIES=300 SEED=0 ## python -m pytest -q tests/fuzz --tries 300 --seed 0
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(SIDE_BY_SIDE) -p xdist tests/fuzz --tries $(TRIES) --seed $(SEED)

families: $(READY) ## every family of models that transformers knows, small, from folder to export ## python -m pytest -q tests/families
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(SIDE_BY_SIDE) -p xdist tests/families

# DIR=qlora_lib/lora or other files and folders, with more than one in quotes.
mutants: $(READY) ## small changes of quant/ and extraction.py, one at a time, that their tests do not notice ## python -m tests.support.mutants --sample 300 qlora_lib/quant
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_NUM_THREADS=1 $(PYTHON) -m tests.support.mutants \
	    --sample 300 $(or $(DIR),qlora_lib/quant qlora_lib/evaluation/extraction.py)

# Each in an environment of its own beside $(VENV), made anew.
lowest: ## unit and long tests with the oldest torch, transformers ... that pyproject.toml allows
newest: ## unit and long tests with the newest of all packages
lowest newest: $(READY)
	rm -rf $(VENV)-$@
	$(call new_venv,$(VENV)-$@)
	@$(PYTHON) -m tests.support.version_bounds $@ > $(VENV)-$@/requirements.txt
	$(call install,$(VENV)-$@,-r $(VENV)-$@/requirements.txt)
	$(call install,$(VENV)-$@,--no-deps -e .)
	@touch $(VENV)-$@/.ready
	$(MAKE) --no-print-directory unit long VENV=$(VENV)-$@

interop: $(PEERS)/.ready ## compare with bitsandbytes, PEFT, GPTQModel, compressed-tensors, transformers, llama.cpp ## python -m pytest -q tests/interop
	$(PEERS)/bin/python -m pytest -q tests/interop

# It runs all of them. EXECUTED=1, which make test gives, leaves out a notebook that make run-all
# GRID=1 has executed, if the notebook, the library, the course, the data and the installed
# packages are still those of that run: it compares the outputs of the run instead.
nbval: $(READY) ## run the notebooks again and compare with their stored outputs ## python -m pytest -q --nbval --nbval-current-env notebooks
	$(SIDE_BY_SIDE) --dist loadfile --no-loadscope-reorder --nbval --nbval-current-env \
	    --nbval-cell-timeout=900 --nbval-kernel-startup-timeout=120 $(if $(EXECUTED),--executed) \
	    $(if $(NB),$(foreach n,$(NB),notebooks/$(n)*.ipynb),notebooks/[0-9][0-9]_*.ipynb)

SELECTED = $(if $(NB),-k "offline $(foreach n,$(NB),or $(n)_)")
IN_BROWSER = $(SIDE_BY_SIDE) --dist loadgroup --no-loadscope-reorder tests/browser $(SELECTED)

# EXECUTED=1 runs of a notebook that make run-all GRID=1 has executed only those cells that its
# pictures with controls need, under the conditions of nbval.
ui: $(VENV)/.browser ## run the notebooks in JupyterLab in a browser, move every control ## python -m pip install -r tests/browser/requirements.txt; python -m pytest tests/browser
	$(IN_BROWSER) $(if $(EXECUTED),--executed)

pictures: $(VENV)/.browser ## the same, and take the pictures of the README ## python -m pytest tests/browser --pictures docs/pictures
	$(IN_BROWSER) --pictures docs/pictures

store: $(READY) ## run the notebooks and keep their outputs in them ## python -m course.tools store [01 02]
	$(TOOLS) store $(NB)

normal: $(READY) ## mend notebooks saved by JupyterLab, for a commit ## python -m course.tools normal [01 02]
	$(TOOLS) normal $(NB)

solved: $(READY) ## run the notebooks with their folded solutions in place ## python -m course.tools solved [01 02]
	$(TOOLS) solved $(NB)

html: $(READY) ## the course as web pages, readable offline, in build/html ## python -m course.tools html
	$(TOOLS) html

badges: $(READY) ## the notebooks for Colab and Kaggle, REPO=owner/name on GitHub, in hosted ## python -m course.tools badges OWNER/NAME
	@test -n "$(REPO)" || { echo "make badges REPO=owner/name, of your copy of this repository on GitHub" >&2; exit 2; }
	$(TOOLS) badges "$(REPO)"

student: $(READY) ## the notebooks without solutions and outputs, in build/student ## python -m course.tools student [01 02]
	$(TOOLS) student $(NB)

grade: $(READY) ## check the exercises of all submissions, DIR=folder ## python -m course.tools grade FOLDER
	@test -n "$(DIR)" || { echo "make grade DIR=folder, with a notebook or a folder of notebooks for each student" >&2; exit 2; }
	$(TOOLS) grade "$(DIR)"

lab: $(READY) ## JupyterLab on this machine only, with a token ## python -m jupyterlab --ServerApp.ip=127.0.0.1
	@echo "From another machine: ssh -N -L $(PORT):127.0.0.1:$(PORT) $$(id -un)@$$(hostname)"
	@echo "then open there the address with the token that follows."
	$(PYTHON) -m jupyterlab --no-browser --ServerApp.ip=127.0.0.1 --ServerApp.port=$(PORT) \
	    --ServerApp.port_retries=0 --ServerApp.root_dir="$(CURDIR)" \
	    --LabApp.default_url=/lab/tree/notebooks $$(test "$$(id -u)" != 0 || echo --allow-root)

kernel: $(READY) ## offer this environment to a JupyterLab that already runs ## python -m ipykernel install --user --name qlora-course
	$(PYTHON) -m ipykernel install --user --name qlora-course --display-name "Python (qlora course)"

pretrain: $(READY) ## train the bundled tiny model again, from its seed ## python -m experiments.toy.pretrain
	$(PYTHON) -m experiments.toy.pretrain

experiments: $(READY) ## make the recorded results in data/results again ## python -m experiments.accuracy; python -m experiments.sampling; python -m experiments.adapters
	$(PYTHON) -m experiments.accuracy
	$(PYTHON) -m experiments.sampling
	$(PYTHON) -m experiments.step
	$(PYTHON) -m experiments.learning_rates
	$(PYTHON) -m experiments.exact_merge
	$(PYTHON) -m experiments.calibrated_init
	$(PYTHON) -m experiments.outliers
	$(PYTHON) -m experiments.adapters
	$(PYTHON) -m experiments.serving
	$(PYTHON) -m experiments.cache

bench: $(PEERS)/.ready ## us and the peers side by side, on an idle CPU ## python -m benchmarks
	$(PEERS)/bin/python -m benchmarks

benchmark-gpu: $(READY) ## memory and speed of QLoRA on this GPU ## python benchmarks/gpu.py
	$(PYTHON) benchmarks/gpu.py

finetune: $(READY) ## calibrate, quantize, train an adapter, save both ## python -m qlora_lib finetune --profile tiny
	$(PYTHON) -m qlora_lib finetune --profile $(PROFILE)

evaluate: $(READY) ## score what finetune saved ## python -m qlora_lib evaluate --profile tiny
	$(PYTHON) -m qlora_lib evaluate --profile $(PROFILE)

clean: ## remove build/, outputs/ and caches; keeps .venv and checkpoints/
	rm -rf build outputs .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(PEERS)/*' -prune -exec rm -rf {} +
