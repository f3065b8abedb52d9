# Locks of nix/lock to Python environments: venvs that hold the files of their wheels themselves. Links would not do:
# wheels find each other by place (torch looks for CUDA in $ORIGIN/../../nvidia/cu13/lib).
{
  runCommand,
  fetchPypi,
  fetchurl,
  python,
  # The folder of PyTorch's own index, with its closing slash: wheels of versions like 2.13.0+cpu lie in its cpu/.
  torchIndex,
}:
let
  site = "lib/python${python.pythonVersion}/site-packages";
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
        inherit line file;
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

  # pip from the interpreter's own bundle, in a venv that is thrown away; it installs into $out.
  pip = ''
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

  # What is installed in `below` can be imported here; .pth files in there are honoured, too.
  over = below: ''
    echo "import site; site.addsitedir('${below}/${site}')" > "$out/${site}/below.pth"
  '';
in
{
  # The wheels of a lock file: { name, file, line, isWheel, source }, where `source` is the derivation that fetches it.
  # One that is none is a source archive of Python alone.
  wheelsOf =
    lock:
    map parse (
      builtins.filter (line: builtins.isString line && line != "" && builtins.substring 0 1 line != "#") (
        builtins.split "\n" (builtins.readFile lock)
      )
    );

  # One flat environment of the wheels, over another one where `below` is given.
  environment =
    {
      name,
      wheels,
      below ? null,
    }:
    let
      built = builtins.partition (wheel: wheel.isWheel) wheels;
      requirements = wheels: builtins.toFile "${name}.txt" (each "\n" (wheel: wheel.line) wheels);
    in
    runCommand name { } (
      pip
      + ''
        mkdir "$TMPDIR/wheels"
        ${each "\n" (wheel: "ln -s ${wheel.source} \"$TMPDIR/wheels/${wheel.file}\"") wheels}
        pip_install --require-hashes --find-links "$TMPDIR/wheels" --requirement ${requirements built.right}
      ''
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
      + (if below == null then "" else over below)
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
    runCommand name { } (
      pip
      + over below
      + ''
        cp -r --no-preserve=mode ${source} "$TMPDIR/source"
        ${if commit == null then "" else "echo ${commit} > \"$TMPDIR/source/yaptext/commit.txt\""}
        pip_install --no-build-isolation "$TMPDIR/source"
      ''
      + compile
    );
}
