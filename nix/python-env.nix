# Locks of nix/lock to Python environments: venvs that hold the files of their wheels themselves. Links would not do:
# wheels find each other by place (torch looks for CUDA in $ORIGIN/../../nvidia/cu13/lib).
{
  pkgs,
  # The folders of the libraries that wheels expect of the system, with a colon between them.
  libraries,
  # The folder of PyTorch's own index, with its closing slash: wheels of versions like 2.13.0+cpu lie in its cpu/.
  torchIndex,
}:
let
  inherit (pkgs) runCommand fetchPypi fetchurl;

  site = python: "lib/python${python.pythonVersion}/site-packages";
  each = separator: make: items: builtins.concatStringsSep separator (map make items);

  # name==version --hash=sha256:...  # distribution-version-python-abi-platform.whl, or distribution-version.tar.gz
  parse =
    line:
    let
      fields = builtins.match "([^ =]+)==([^ ]+) --hash=sha256:([0-9a-f]+)  # ([^ ]+)" line;
      field = builtins.elemAt fields;
      version = field 1;
      sha256 = field 2;
      file = field 3;
      variant = builtins.match "[^+]+\\+(.+)" version;
      wheel = builtins.match "([^-]+)-[^-]+-([^-]+)-([^-]+)-([^-]+)\\.whl" file;
      tag = builtins.elemAt wheel;
      archive = builtins.match "(.+)-[^-]+\\.tar\\.gz" file;
    in
    if fields == null || (wheel == null && archive == null) then
      throw "not a line of a lock: ${line}"
    else
      {
        inherit line file version;
        name = field 0;
        isWheel = wheel != null;
        source =
          if wheel == null then
            fetchPypi {
              pname = builtins.head archive;
              inherit version sha256;
            }
          else if variant == null then
            fetchPypi {
              pname = tag 0;
              inherit version sha256;
              format = "wheel";
              dist = tag 1;
              python = tag 1;
              abi = tag 2;
              platform = tag 3;
            }
          else
            fetchurl {
              name = file;
              url = torchIndex + builtins.head variant + "/" + builtins.replaceStrings [ "+" ] [ "%2B" ] file;
              inherit sha256;
            };
      };

  # The interpreter that the first line of a lock names: `# serve-cpu: CPython 3.11 on ...`. nixpkgs drops each in time,
  # by taking the attribute out or by leaving one that throws.
  pythonOf =
    lock: line:
    let
      minor = builtins.match "# .*: CPython 3\\.([0-9]+) on .*" line;
      found = builtins.tryEval (pkgs."python3${builtins.head minor}" or null);
    in
    if minor == null then
      throw "the first line of ${baseNameOf lock} names no CPython: ${line}"
    else if found.success && found.value != null then
      found.value
    else
      throw "${baseNameOf lock} is for CPython 3.${builtins.head minor}, which this nixpkgs does not have: take the one that flake.lock names, or resolve the lock for another Python";

  # pip from the interpreter's own bundle, in a venv that is thrown away; it installs into $out.
  pip = python: ''
    export HOME="$TMPDIR"
    ${python.interpreter} -m venv "$TMPDIR/pip"
    ${python.interpreter} -m venv --without-pip "$out"
    pip_install() {
      "$TMPDIR/pip/bin/python" -m pip --isolated --disable-pip-version-check --python "$out/bin/python" \
        install --quiet --no-index --no-deps --no-compile --no-cache-dir "$@"
    }
  '';

  # The store sets every time to 1970, so bytecode must not be compared with its source by time. Some packages carry
  # templates that are not Python: those fail, harmlessly.
  compile = ''
    "$out/bin/python" -W ignore -m compileall -qq -j "$NIX_BUILD_CORES" --invalidation-mode unchecked-hash \
      "$out/lib" || true
  '';

  # Programs of wheels (ninja, ptxas, nvcc) ask for /lib64/ld-linux-x86-64.so.2, which on NixOS is a stub that fails. They
  # get the loader of the store, and its libraries if they need more than glibc.
  load = ''
    programs() { "$out/bin/python" ${./programs.py} "$out"; }
    loader=${pkgs.stdenv.cc.bintools.dynamicLinker}
    [[ -x $loader ]] || { echo "there is no loader $loader" >&2; exit 1; }
    while IFS=$'\t' read -r asked program; do
      ${pkgs.patchelf}/bin/patchelf --set-interpreter "$loader" "$program"
      case $(${pkgs.patchelf}/bin/patchelf --print-needed "$program") in
        *libstdc++.so* | *libgcc_s.so* | *libz.so*) ${pkgs.patchelf}/bin/patchelf --add-rpath ${libraries} "$program" ;;
      esac
    done < <(programs)
    while IFS=$'\t' read -r asked program; do
      [[ $asked == "$loader" ]] || { echo "$program asks for $asked instead of $loader" >&2; exit 1; }
    done < <(programs)
  '';

  # What is installed in `below` can be imported here; .pth files in there are honoured, too. Its scripts run here with
  # the Python of this layer, which sees both.
  over = below: ''
    echo "import site; site.addsitedir('${below}/${site below.python}')" > "$out/${site below.python}/below.pth"
    for script in ${below}/bin/*; do
      name=''${script##*/}
      case $name in
        python* | [Aa]ctivate*) ;;
        *)
          IFS= read -r first < "$script" || true
          if [[ $first == "#!${below}/bin/python"* ]]; then
            sed "1s|^#!${below}/|#!$out/|" "$script" > "$out/bin/$name"
            chmod +x "$out/bin/$name"
          else
            ln -s "$script" "$out/bin/$name"
          fi
          ;;
      esac
    done
  '';
in
{
  # { python, wheels } of a lock file. A wheel is { name, version, file, line, isWheel, source }, where `source` is the derivation
  # that fetches it. One that is none is a source archive of Python alone.
  read =
    lock:
    let
      lines = builtins.filter (line: builtins.isString line && line != "") (
        builtins.split "\n" (builtins.readFile lock)
      );
    in
    {
      python = pythonOf lock (builtins.head lines);
      wheels = map parse (builtins.filter (line: builtins.substring 0 1 line != "#") lines);
    };

  # One flat environment of the wheels, over another one if `below` is given.
  environment =
    {
      name,
      python,
      wheels,
      below ? null,
    }:
    let
      built = builtins.partition (wheel: wheel.isWheel) wheels;
      requirements = wheels: builtins.toFile "${name}.txt" (each "\n" (wheel: wheel.line) wheels);
    in
    assert below == null || below.python.pythonVersion == python.pythonVersion;
    runCommand name { passthru.python = python; } (
      pip python
      + ''
        mkdir "$TMPDIR/wheels"
        ${each "\n" (wheel: "ln -s ${wheel.source} \"$TMPDIR/wheels/${wheel.file}\"") wheels}
        pip_install --require-hashes --find-links "$TMPDIR/wheels" --requirement ${requirements built.right}
      ''
      + (if below == null then "" else over below)
      # By the setuptools that is among the wheels.
      + (
        if built.wrong == [ ] then
          ""
        else
          ''
            pip_install --require-hashes --find-links "$TMPDIR/wheels" --no-build-isolation --no-binary :all: \
              --requirement ${requirements built.wrong}
          ''
      )
      + load
      + compile
    );

  # A project over an environment that holds its build backend. A layer of its own: an edit costs a second, not the
  # gigabytes below.
  project =
    {
      name,
      source,
      below,
      commit ? null,
    }:
    runCommand name { passthru.python = below.python; } (
      pip below.python
      + over below
      + ''
        cp -r --no-preserve=mode ${source} "$TMPDIR/source"
        ${if commit == null then "" else "echo ${commit} > \"$TMPDIR/source/yaptext/commit.txt\""}
        pip_install --no-build-isolation "$TMPDIR/source"
      ''
      + compile
    );
}
