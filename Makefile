# make serve     sets everything up and serves on HOST:PORT
# make quantize  sets everything up and makes AWQ weights of CHAT_MODEL and TOOL_MODEL (ARGS: of yap-text quantize)
# make install   builds a version into PREFIX beside the older ones, then installs units and links (root; ARGS: of yap-text install)
# make rollback  returns to the previous version (root)
# make test      sets everything up and runs the tests, on CPU
# make test-systemd, make test-nix   test the units on real systemd (root), the flake on real Nix
# make lint      runs ruff, mypy, import-linter and the check of the locks
# make test-browser  runs the browser client and the playground in headless Chromium (needs Debian's chromium)
# make test-clients  installs other people's clients, a load generator too, and runs them against the service (tests/clients/README.md)
# make audit     looks for known vulnerabilities of the locked packages (network; ARGS: of pip-audit)
# make sbom      writes a bill of materials of this machine's environment, dist/ENV.cdx.json (CycloneDX)
# make image     packs ENV into an OCI archive of three layers, dist/yap-text-ENV.oci.tar (root; IMAGE_USER, MIRROR)
# make tables    writes what follows from settings and metrics: nix/settings.json, the tables of SETTINGS.md and observe/README.md
# make units     does the same, and renders systemd/ (Nix)
# make lock      resolves the locks again (network)
# make clean     removes everything that these commands made

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.ONESHELL:
.SUFFIXES:

PYTHON ?=
HOST ?= 127.0.0.1
PORT ?= 8000
PREFIX ?= /opt/yap-text
ENV ?= $(if $(wildcard /proc/driver/nvidia/version),serve-cuda,serve-cpu)

# PYTHON, if it is given, comes before any that uv finds.
SETUP := PYTHON='$(PYTHON)'; . nix/lock/uv.sh
VENV := .venv/$(ENV)
VENVS := .venv/serve-cpu .venv/serve-cuda
CPU := .venv/serve-cpu

SIZE_serve-cpu := 0.8 GB to download, 2.9 GB installed, 1 to 3 minutes
SIZE_serve-cuda := 3.7 GB to download, 9 GB installed, 2 to 10 minutes
SIZE_test := 100 MB, half a minute
SIZE_browser := 50 MB to download, 165 MB installed
SIZE_audit := 60 MB, half a minute
SIZE_clients := 220 MB to download, 750 MB installed, half a minute
SIZE_load := 140 MB to download, 630 MB installed, half a minute

.PHONY: serve quantize install rollback test test-systemd test-nix test-clients test-browser lint lock audit sbom image tables units clean venv venv-test venv-clients

serve: venv
	@HOST='$(HOST)' PORT='$(PORT)' exec $(VENV)/bin/yap-text serve

quantize: venv $(VENV)/llmcompressor/lock.txt
	@exec $(VENV)/bin/yap-text quantize $(ARGS)

# A version is built at its final path, since a venv cannot be moved. Until its own `yap-text install` points the link
# `current` to it, a crash starts the previous version. built.txt is a copy of the lock; it gets its name last.
# A version with the same lock shares its wheels as hard links: uv replaces files and never writes into them. None are
# linked to uv's cache, which may belong to another user. A Python that uv downloads goes into the version: units see no home.
install:
	@$(SETUP)
	umask 022
	prefix='$(abspath $(PREFIX))' lock=nix/lock/$(ENV).txt
	! at_home "$$prefix" || fail "$$prefix is below a home folder, which units do not see. Name another: PREFIX="
	needs $(ENV)
	use_uv
	OUTSIDE_HOME=1 find_python "$$(python_of $$lock)" $(ENV) || python=
	mkdir -p "$$prefix" || fail "run it as root, or name another folder: make install PREFIX=DIR"
	exec 9< "$$prefix"
	flock -n 9 || fail "another make install is running in $$prefix"
	for part in "$$prefix"/*/built.txt.part; do # of a build that was killed
	    folder=$${part%/*}
	    if [ -e "$$part" ] && [ ! -L "$$folder" ]; then rm -rf "$$folder"; fi
	done
	commit=$$(git --git-dir=.git --work-tree=. describe --always --dirty --abbrev=40 '--exclude=*' 2> /dev/null || true)
	contents=$$({
	    if [ "$$python" ]; then base_of "$$python"; fi
	    find pyproject.toml $$lock nix/lock/llmcompressor.txt systemd yaptext -type f ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
	} | sha256sum)
	release=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
	version=$$prefix/$$release$${commit:+-$${commit:0:7}$${commit:40}}-$${contents:0:8}
	if [ ! -e "$$version/built.txt" ]; then
	    trap 'rm -rf "$$version"' EXIT
	    mkdir "$$version"
	    cp $$lock "$$version/built.txt.part"
	    lender=
	    for built in "$$prefix"/*/built.txt; do
	        if cmp -s $$lock "$$built"; then lender=$${built%/*}; fi
	    done
	    if [ "$$lender" ]; then
	        lender=$$(realpath "$$lender")
	        echo "$(ENV): creating $$version with the wheels of $$lender"
	        find "$$lender" -mindepth 1 -maxdepth 1 ! -name built.txt -exec cp -al -t "$$version" {} +
	        rm -rf "$$version"/{pyvenv.cfg,bin/{activate*,python*,yap-text}} "$$version"/lib/python*/site-packages/yaptext*
	        find "$$version" -maxdepth 2 -path '*/python/*' -type l -delete # uv's, by full path: to the lender's Python
	    else
	        echo "$(ENV): creating $$version with $$(grep -c == $$lock) wheels: $(SIZE_$(ENV))"
	    fi
	    [ "$$python" ] || bring_python "$$(python_of $$lock)" "$$version/python"
	    "$$UV" venv --quiet --no-project --allow-existing --python "$$python" "$$version"
	    if [ "$$lender" ]; then
	        { grep -lIZF -d skip "$$lender/" "$$version"/bin/* || true; } | xargs -0r sed -i "1,3s|$$lender/|$$version/|"
	    else
	        UV_LINK_MODE=copy add "$$version" $$lock
	    fi
	    add_compressor "$$version"
	    project "$$version"
	    for package in "$$version"/lib/python*/site-packages/yaptext; do echo "$$commit" > "$$package/commit.txt"; done
	    chmod -R go+rX,go-w "$$version" # uv's cache may have been filled under another umask
	    sync -f "$$version"
	    mv "$$version"/built.txt{.part,}
	    trap - EXIT
	fi
	exec "$$version/bin/yap-text" install $(ARGS)

rollback:
	@command='$(abspath $(PREFIX))/previous/bin/yap-text'
	[ -x "$$command" ] || { echo "there is no previous version in $(PREFIX)" >&2; exit 1; }
	exec "$$command" install $(ARGS)

test: venv-test
	@$(CPU)/bin/python -m pytest -m 'not systemd and not nix and not clients and not browser' --cov=yaptext --cov-report=term:skip-covered $(ARGS)

test-systemd test-nix: venv-test
	@$(CPU)/bin/python -m pytest -m $(@:test-%=%) $(ARGS)

test-clients: venv-test venv-clients
	@$(CPU)/bin/python -m pytest -m clients $(ARGS)

test-browser: venv-test $(CPU)/browser.txt
	@$(CPU)/bin/python -m pytest -m browser $(ARGS)

lint: venv-test
	$(CPU)/bin/ruff check
	$(CPU)/bin/ruff format --check
	$(CPU)/bin/mypy
	$(CPU)/bin/lint-imports
	$(CPU)/bin/python nix/lock/lock.py --check

# Each Python resolves the locks that are for it.
lock:
	@$(SETUP)
	use_uv
	for version in $$(sed -n 's/^python = "\(.*\)"/\1/p' pyproject.toml | sort -uV); do
	    find_python $$version || bring_python $$version
	    rm -rf .venv/lock/$$version
	    "$$UV" venv --quiet --no-project --python "$$python" .venv/lock/$$version
	    "$$UV" pip install --quiet --python .venv/lock/$$version pip packaging setuptools
	    .venv/lock/$$version/bin/python nix/lock/lock.py
	done

audit: .venv/audit/lock.txt
	@.venv/audit/bin/python nix/lock/audit.py $(ARGS)

sbom: .venv/audit/lock.txt $(VENV)/lock.txt
	@mkdir -p dist
	.venv/audit/bin/python nix/lock/sbom.py $(ENV) > dist/$(ENV).cdx.json.part
	mv dist/$(ENV).cdx.json{.part,}
	echo "dist/$(ENV).cdx.json"

image:
	@ENV='$(ENV)' exec nix/image/build.sh

tables: venv-test
	@$(CPU)/bin/python nix/settings.py > nix/settings.json.part
	mv nix/settings.json{.part,}
	$(CPU)/bin/python nix/pages.py

units: tables
	@nix-instantiate --eval --strict --json -E 'import ./nix/render.nix {}' | $(or $(PYTHON),python3) -c '
	import json, pathlib, sys
	for file in json.load(sys.stdin).items(): pathlib.Path("systemd", file[0]).write_text(file[1])'

clean:
	if [ -d .venv/nix ]; then chmod -R u+w .venv/nix; fi # store folders are read-only
	rm -rf .venv build dist .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find yaptext tests nix -name __pycache__ -prune -exec rm -rf {} +

venv: $(VENV)/project
venv-test: $(CPU)/project $(CPU)/test.txt $(CPU)/llmcompressor/lock.txt .venv/audit/lock.txt
venv-clients: .venv/clients/lock.txt .venv/load/lock.txt

# A stamp is a copy of the lock that the venv holds. It is written last, so that an interrupted install leaves none, and
# compared, so that a checkout that only touches the lock installs nothing. Static patterns: make would delete the
# intermediate files of an implicit chain.

$(VENVS:%=%/lock.txt) .venv/audit/lock.txt .venv/clients/lock.txt .venv/load/lock.txt: .venv/%/lock.txt: nix/lock/%.txt
	@if cmp -s $< $@; then touch $@; exit; fi
	$(SETUP)
	needs $*
	use_uv
	echo "$*: creating $(@D) with $$(grep -c == $<) wheels: $(SIZE_$*)"
	create $(@D) $<
	cp $< $@

$(VENVS:%=%/llmcompressor/lock.txt): %/llmcompressor/lock.txt: nix/lock/llmcompressor.txt %/lock.txt
	@$(SETUP)
	use_uv
	add_compressor $*
	touch $@

$(CPU)/test.txt $(CPU)/browser.txt: $(CPU)/%.txt: nix/lock/%.txt $(CPU)/lock.txt
	@if cmp -s $< $@; then touch $@; exit; fi
	$(SETUP)
	echo "$*: adding $$(grep -c == $<) wheels: $(SIZE_$*)"
	use_uv
	add $(CPU) $<
	cp $< $@

$(VENVS:%=%/project): %/project: %/lock.txt pyproject.toml
	@$(SETUP)
	use_uv
	project $(@D) --editable
	touch $@
