# make serve   sets everything up and serves on HOST:PORT
# make quantize   sets everything up and makes AWQ weights of CHAT_MODEL and TOOL_MODEL (ARGS: of yap-text quantize)
# make install   builds a version into PREFIX beside those there, then puts units and links in place (root; ARGS: of yap-text install)
# make rollback   goes back to the version before (root)
# make test    sets everything up and runs the tests, on CPU
# make test-systemd, make test-nix   the units on real systemd (needs root), the flake on real Nix
# make lint    ruff, mypy, import-linter and the locks
# make audit   asks for known vulnerabilities of what the locks pin (needs a network; ARGS: of pip-audit)
# make sbom    writes what this machine's environment is made of as CycloneDX, dist/ENV.cdx.json
# make units   renders systemd/ from nix/units.nix (needs Nix)
# make lock    resolves the locks anew (needs the registries)
# make clean   removes what these made

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.ONESHELL:
.SUFFIXES:

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
PREFIX ?= /opt/yap-text
ENV ?= $(if $(wildcard /proc/driver/nvidia/version),serve-cuda,serve-cpu)

VENV := .venv/$(ENV)
VENVS := .venv/serve-cpu .venv/serve-cuda
CPU := .venv/serve-cpu

SIZE_serve-cpu := 2.6 GB installed, 2 to 5 minutes
SIZE_serve-cuda := 8.5 GB installed, 4 to 15 minutes
SIZE_test := 100 MB, half a minute
SIZE_audit := 60 MB, half a minute

.PHONY: serve quantize install rollback test test-systemd test-nix lint lock audit sbom units clean venv venv-test

serve: venv
	@HOST='$(HOST)' PORT='$(PORT)' exec $(VENV)/bin/yap-text serve

quantize: venv
	@exec $(VENV)/bin/yap-text quantize $(ARGS)

# A version is built at its final path, since a venv cannot be moved. Until its own `yap-text install` leads the link
# `current` to it, a crash starts the version before. built.txt is a copy of the lock; it gets its name last.
# A version with the same lock lends its wheels as hard links: pip replaces files, and writes into none.
install:
	@$(call require-python)
	umask 022
	prefix='$(abspath $(PREFIX))' lock=nix/lock/$(ENV).txt
	python=$$($(PYTHON) -c 'import sys; print(sys.base_prefix)')
	for place in "$$python" "$$prefix"; do
	    case $$place/ in
	        /home/* | /root/*) echo "$$place is below a home folder, which units do not see. Name another: PYTHON=, PREFIX=" >&2; exit 1 ;;
	    esac
	done
	mkdir -p "$$prefix" || { echo "root can; or name another folder: make install PREFIX=DIR" >&2; exit 1; }
	exec 9< "$$prefix"
	flock -n 9 || { echo "another make install builds in $$prefix" >&2; exit 1; }
	for part in "$$prefix"/*/built.txt.part; do # of one that was killed
	    folder=$${part%/*}
	    if [ -e "$$part" ] && [ ! -L "$$folder" ]; then rm -rf "$$folder"; fi
	done
	commit=$$(git --git-dir=.git --work-tree=. describe --always --dirty --abbrev=40 '--exclude=*' 2> /dev/null || true)
	contents=$$({
	    echo "$$python"
	    find pyproject.toml $$lock systemd yaptext -type f ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
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
	        rm -rf "$$version"/{pyvenv.cfg,bin/{activate*,Activate*,python*,yap-text}} "$$version"/lib/python*/site-packages/yaptext*
	        $(PYTHON) -m venv --without-pip "$$version"
	        { grep -lIZF -d skip "$$lender/" "$$version"/bin/* || true; } | xargs -0r sed -i "1,3s|$$lender/|$$version/|"
	    else
	        echo "$(ENV): creating $$version with $$(grep -c == $$lock) wheels: $(SIZE_$(ENV))"
	        $(PYTHON) -m venv "$$version"
	        $(call install,"$$version",$$lock)
	    fi
	    "$$version/bin/python" -m pip install -q --no-index --no-deps --no-build-isolation .
	    for package in "$$version"/lib/python*/site-packages/yaptext; do echo "$$commit" > "$$package/commit.txt"; done
	    $(call compile,"$$version")
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
	@$(CPU)/bin/python -m pytest -m 'not systemd and not nix' --cov=yaptext --cov-report=term:skip-covered $(ARGS)

test-systemd test-nix: venv-test
	@$(CPU)/bin/python -m pytest -m $(@:test-%=%) $(ARGS)

lint: venv-test
	$(CPU)/bin/ruff check
	$(CPU)/bin/ruff format --check
	$(CPU)/bin/mypy
	$(CPU)/bin/lint-imports
	$(CPU)/bin/python nix/lock/lock.py --check

lock: .venv/lock/ready
	@.venv/lock/bin/python nix/lock/lock.py

audit: .venv/audit/lock.txt
	@.venv/audit/bin/python nix/lock/audit.py $(ARGS)

sbom: .venv/audit/lock.txt $(VENV)/lock.txt
	@mkdir -p dist
	.venv/audit/bin/python nix/lock/sbom.py $(ENV) > dist/$(ENV).cdx.json.part
	mv dist/$(ENV).cdx.json{.part,}
	echo "dist/$(ENV).cdx.json"

units:
	@nix-instantiate --eval --strict --json -E 'import ./nix/render.nix {}' | $(PYTHON) -c '
	import json, pathlib, sys
	for file in json.load(sys.stdin).items(): pathlib.Path("systemd", file[0]).write_text(file[1])'

clean:
	if [ -d .venv/nix ]; then chmod -R u+w .venv/nix; fi # store folders are read-only
	rm -rf .venv build dist .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find yaptext tests nix -name __pycache__ -prune -exec rm -rf {} +

venv: $(VENV)/project
venv-test: $(CPU)/project $(CPU)/test.txt .venv/audit/lock.txt

# A stamp is a copy of the lock that the venv holds: written last, so that an interrupted install counts as none, and
# compared, so that a checkout that only touches the lock installs nothing. Static patterns: make would delete what an
# implicit chain leaves in its middle.

$(VENVS:%=%/lock.txt) .venv/audit/lock.txt: .venv/%/lock.txt: nix/lock/%.txt
	@if cmp -s $< $@; then touch $@; exit; fi
	$(call require-python)
	rm -rf $(@D)
	echo "$*: creating $(@D) with $$(grep -c == $<) wheels: $(SIZE_$*)"
	$(PYTHON) -m venv $(@D)
	$(call install,$(@D),$<)
	echo "$*: compiling bytecode"
	$(call compile,$(@D))
	cp $< $@

$(CPU)/test.txt: nix/lock/test.txt $(CPU)/lock.txt
	@if cmp -s $< $@; then touch $@; exit; fi
	echo "test: adding $$(grep -c == $<) wheels: $(SIZE_test)"
	$(call install,$(CPU),$<)
	$(call compile,$(CPU))
	cp $< $@

# Editable, and built by the locked backend: no network.
$(VENVS:%=%/project): %/project: %/lock.txt pyproject.toml
	@$(@D)/bin/python -m pip install -q --no-index --no-deps --no-build-isolation --editable .
	touch $@

.venv/lock/ready:
	@$(call require-python)
	$(PYTHON) -m venv .venv/lock
	.venv/lock/bin/python -m pip install -q --only-binary=:all: --upgrade pip packaging
	touch $@

define require-python
$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
    echo "the locks are for Python 3.11; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name one: make PYTHON=/path/to/python3.11" >&2; \
    exit 1; }
endef

# $(call install,VENV,LOCK): of pip's output, the large downloads, a count, and whatever went wrong.
# An interrupt ends it without the hint. What has no wheel (.tar.gz) comes second: the lock's own setuptools builds it,
# so that nothing is fetched but what the lock names.
define install
trap 'exit 130' INT TERM
progress() {
    local seen=0 line
    while IFS= read -r line; do
        case $$line in
            Collecting* | Processing*) if (( ++seen % 25 == 0 )); then echo "  $$seen of $$(grep -c == $(2)) wheels"; fi ;;
            *Downloading*\([0-9][0-9]*" MB)" | *Downloading*" GB)") echo "$$line" ;;
            Installing*) echo "  unpacking" ;;
            Looking\ in* | Successfully* | *Downloading* | *Using\ cached* | *ninstall* | *Found\ existing*) ;;
            *Preparing\ metadata* | *Building\ wheel* | *Created\ wheel* | *Stored\ in*) ;;
            WARNING:\ Location*) ;;
            *) echo "$$line" ;;
        esac
    done
}
pip_install() {
    $(1)/bin/python -m pip install --disable-pip-version-check --progress-bar off --no-compile --require-hashes --no-deps \
        "$$@" 2>&1 | progress || { echo >&2; echo "$$WHEEL_HINT" >&2; exit 1; }
}
pip_install --only-binary=:all: -r <(grep -v '\.tar\.gz$$' $(2))
if grep -q '\.tar\.gz$$' $(2); then
    pip_install --no-build-isolation --no-binary=:all: -r <(grep '\.tar\.gz$$' $(2))
fi
endef

# Every engine process imports vLLM anew. Some packages carry templates that are not Python: those fail, harmlessly.
define compile
$(1)/bin/python -W ignore -m compileall -qq -j 0 $(1)/lib || true
endef

define WHEEL_HINT
pip could not install the wheels of the lock; its reason is above. If it found no torch ending in +cpu: those builds are in
PyTorch's CPU wheel index; give it to pip with its --extra-index-url option, which is PIP_EXTRA_INDEX_URL in the environment.
endef
export WHEEL_HINT
