# `make finetune` runs the main job, `make test` runs every test in two processes of one thread, `make reports` makes what is stale or missing in reports/. Each sets up what it needs in .venv/ first.
PYTHON ?= python3
TASK ?= openmoji
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: finetune test test-gpu reports families clean

finetune: $(STAMP)
	$(BIN)/python -m mope_clip.cli run 20_finetune -p task $(TASK)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -n $(WORKERS) --dist worksteal

# on a machine with a card: what is skipped elsewhere
test-gpu: $(STAMP)
	$(BIN)/python -m pytest tests -q -m gpu

reports: $(STAMP)
	$(BIN)/python -m mope_clip.cli report --all

# made again when a requirement changes; the stamp is written last, so a killed installation is taken up again
$(STAMP): settings.ini constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[all]'
	touch $(STAMP)

# what of every pretrained tag of the installed open_clip can be compressed, into data/families.csv (some minutes)
families: $(STAMP)
	$(BIN)/python tests/families_table.py

clean:
	rm -rf runs data/cache build *.egg-info
