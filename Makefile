# `make demo` and `make test` need python3 (3.10 or newer), make and pip's package index; nothing else by hand.
PYTHON ?= python3
VENV ?= .venv
IMAGE ?=
QUESTION ?=

python := $(VENV)/bin/python
visipruner := $(VENV)/bin/visipruner
# pip says what it fetches and how far it is; that takes minutes the first time.
pip := $(python) -m pip install --disable-pip-version-check --no-warn-script-location
# A picture and a question of one's own, or the example that ships
asked = $(if $(IMAGE),--image-file "$(IMAGE)",--example sign)
asked += $(if $(QUESTION),--question "$(QUESTION)",$(if $(IMAGE),--question "What is this?"))
# A process a core; more than eight wait for memory. A free one takes tests from a busy one.
parallel := -n auto --maxprocesses 8 --dist worksteal

.PHONY: help demo chat web report test test-rest test-all test-oldest test-ray notebooks docs lint format clean

help:
	@echo "make demo    install into $(VENV), ask the shipped model about a picture and show what pruning does"
	@echo "make chat    talk about the picture in the terminal"
	@echo "make web     the same in the browser (installs what the page needs)"
	@echo "make report  write report.html: how the question was answered, layer by layer"
	@echo "make test    install what the tests need and run them, a few minutes on two cores"
	@echo "make test-all    the same and what takes longer: training, all notebooks, the oldest transformers"
	@echo "make test-ray    install Ray beside it, half a gigabyte, and test with it"
	@echo "make notebooks   build and run the notebooks of visualization/ from their sources"
	@echo "make docs    build the documentation into site/"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff rewrite the files"
	@echo "make clean   remove $(VENV) and caches"
	@echo "Variables:   PYTHON=python3.12  VENV=.venv  IMAGE=picture.png  QUESTION='What is this?'"
	@echo "             INSTALL_BROWSER=1 lets make test install Chromium (Debian and Ubuntu, as root)"

demo: $(VENV)/installed
	@echo
	@$(visipruner) ask $(asked) --show
	@echo
	@echo "To go on, any of these:"
	@echo "  $(visipruner) chat $(if $(IMAGE),--image-file "$(IMAGE)",--example sign)"
	@echo "  $(visipruner) ask --examples"
	@echo "  $(visipruner) --help"
	@echo "  make web"
	@echo "  make report"

chat: $(VENV)/installed
	@$(visipruner) chat $(if $(IMAGE),--image-file "$(IMAGE)",--example sign)

web: $(VENV)/installed-web
	@$(visipruner) web

report: $(VENV)/installed
	@$(visipruner) report --image "$(or $(IMAGE),llava/assets/images/scene_2.png)" \
		--question "$(or $(QUESTION),What does the text in the image say?)" -o report.html --overwrite

test: $(VENV)/installed-dev
	@INSTALL_BROWSER="$(INSTALL_BROWSER)" bash scripts/install_test_browser.sh
	$(python) -m pytest $(parallel) -m "not slow"

# What `make test` leaves out
test-rest: $(VENV)/installed-dev
	$(python) -m pytest $(parallel) -m slow
	$(MAKE) test-oldest

test-all: test test-rest

# The engine and every family on the oldest transformers that is supported
test-oldest: $(VENV)/installed-dev
	sh scripts/test_oldest_transformers.sh $(python) $(parallel)

# Ray in an environment of its own
test-ray: $(VENV)-ray/installed
	RAY_PYTHON=$(abspath $(VENV)-ray/bin/python) $(python) -m pytest tests/test_ray.py

notebooks: $(VENV)/installed-dev
	$(python) scripts/build_notebooks.py

# Without a warning: a link that leads nowhere ends it
docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict
	@echo "Open site/index.html"

lint: $(VENV)/installed-dev
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

format: $(VENV)/installed-dev
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

clean:
	rm -rf $(VENV) $(VENV)-ray build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The stamps make a second run start at once. torch is installed by itself first, in the pinned version:
# a range would let pip take the newest build with several gigabytes of CUDA libraries.
$(VENV)/torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed; try make PYTHON=python3.12")'
	test -x $(python) || $(PYTHON) -m venv $(VENV)
	@echo "1 of 2: PyTorch into $(VENV) (a few minutes, the first time)"
	$(pip) --constraint constraints.txt torch
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	@echo "2 of 2: the project and what it needs into $(VENV)"
	$(pip) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-web: $(VENV)/installed
	@echo "What the page in the browser needs besides, into $(VENV)"
	$(pip) --constraint constraints.txt --editable '.[web]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/torch pyproject.toml
	@echo "2 of 2: the project and what its tests need into $(VENV)"
	$(pip) --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/installed $(VENV)/installed-web

$(VENV)-ray/installed: $(VENV)/installed-dev scripts/ray_environment.sh
	@echo "Installing Ray into $(VENV)-ray"
	sh scripts/ray_environment.sh $(VENV)-ray $(python)
	@touch $@
