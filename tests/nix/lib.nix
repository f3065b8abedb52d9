# The part of nixpkgs' lib that nix/module.nix and its check use, for machines without nixpkgs: options, their types,
# and evalModules. Stricter in one thing: every option says its type and what it means.
let
  inherit (builtins)
    all
    any
    attrNames
    concatMap
    concatStringsSep
    elemAt
    filter
    foldl'
    hasAttr
    head
    intersectAttrs
    isAttrs
    isBool
    isFloat
    isFunction
    isInt
    isList
    isString
    listToAttrs
    map
    mapAttrs
    removeAttrs
    sort
    stringLength
    substring
    ;

  kind = value: if isAttrs value then value._type or null else null;
  show = concatStringsSep ".";
  union = foldl' (seen: names: seen // names) { };

  # A definition without its properties (mkIf, mkMerge, mkOverride, mkOrder): a list of { priority, order, value }.
  discharge =
    definition:
    let
      found = {
        "if" = if definition.condition then discharge definition.content else [ ];
        merge = concatMap discharge definition.contents;
        override = map (inner: inner // { inherit (definition) priority; }) (discharge definition.content);
        order = map (inner: inner // { order = definition.priority; }) (discharge definition.content);
      };
    in
    found.${toString (kind definition)} or [
      {
        priority = usual;
        order = inTheMiddle;
        value = definition;
      }
    ];
  usual = 100;
  inTheMiddle = 1000;

  # A definition of a group of options as plain attribute sets, the properties pushed down to their attributes:
  # a condition may depend on a neighbour.
  pushDown =
    definition:
    let
      found = {
        "if" = map (mapAttrs (_: mkIf definition.condition)) (pushDown definition.content);
        merge = concatMap pushDown definition.contents;
        override = map (mapAttrs (_: mkOverride definition.priority)) (pushDown definition.content);
      };
    in
    found.${toString (kind definition)} or [ definition ];

  # The value of a type out of discharged definitions, those of the best priority.
  valueOf =
    type: path: found:
    let
      best = foldl' (least: one: if one.priority < least then one.priority else least) (head found).priority found;
      values = map (one: one.value) (sort (a: b: a.order < b.order) (filter (one: one.priority == best) found));
      wrong = filter (value: !type.check value) values;
    in
    if wrong == [ ] then type.merge path values else throw "A definition for option `${show path}' is not of type `${type.name}'.";

  equal =
    path: values:
    if all (value: value == head values) values then
      head values
    else
      throw "The option `${show path}' has conflicting definition values.";

  plain = name: check: {
    inherit name check;
    merge = equal;
  };

  types = {
    bool = plain "boolean" isBool;
    int = plain "integer" isInt;
    float = plain "float" isFloat;
    str = plain "string" isString;
    port = plain "port" (value: isInt value && value >= 0 && value <= 65535);
    package = plain "package" (value: kind value == null && isAttrs value && value.type or "" == "derivation");
    anything = plain "anything" (_: true);
    nullOr = type: {
      name = "null or ${type.name}";
      check = value: value == null || type.check value;
      merge = path: values: if all (value: value == null) values then null else type.merge path values;
    };
    oneOf =
      choices:
      plain (concatStringsSep " or " (map (type: type.name) choices)) (value: any (type: type.check value) choices);
    listOf = type: {
      name = "list of ${type.name}";
      check = value: isList value && all type.check value;
      merge = _: concatMap (value: value);
    };
    submodule =
      {
        options,
        freeformType ? null,
      }:
      {
        name = "submodule";
        check = isAttrs;
        merge = path: values: settle path (options // { _freeform = freeformType; }) values;
      };
    attrsOf = type: {
      name = "attribute set of ${type.name}";
      check = isAttrs;
      merge =
        path: values:
        let
          found = name: concatMap (value: if hasAttr name value then discharge value.${name} else [ ]) values;
          names = filter (name: found name != [ ]) (attrNames (union values));
        in
        listToAttrs (
          map (name: {
            inherit name;
            value = valueOf type (path ++ [ name ]) (found name);
          }) names
        );
    };
  };

  mkOption =
    {
      type,
      description,
      ...
    }@option:
    option // { _type = "option"; };
  mkIf = condition: content: {
    _type = "if";
    inherit condition content;
  };
  mkMerge = contents: {
    _type = "merge";
    inherit contents;
  };
  mkOverride = priority: content: {
    _type = "override";
    inherit priority content;
  };
  mkOrder = priority: content: {
    _type = "order";
    inherit priority content;
  };

  # The values under `path` of the declared options, out of the definitions there.
  settle =
    path: declared: definitions:
    if kind declared == "option" then
      let
        found = concatMap discharge definitions;
        given = found != [ ];
      in
      if given then
        valueOf declared.type path found
      else
        declared.default or (throw "The option `${show path}' is used but not defined.")
    else
      let
        sets = concatMap pushDown definitions;
        options = removeAttrs declared [ "_freeform" ];
        freeform = declared._freeform or null;
        unknown = attrNames (removeAttrs (union sets) (attrNames options));
        inside =
          name: option:
          settle (path ++ [ name ]) option (concatMap (set: if hasAttr name set then [ set.${name} ] else [ ]) sets);
      in
      if unknown == [ ] then
        mapAttrs inside options
      else if freeform != null then
        freeform.merge path (map (set: removeAttrs set (attrNames options)) sets) // mapAttrs inside options
      else
        throw "The option `${show (path ++ [ (head unknown) ])}' does not exist.";

  # Whether so many letters, added, left out or changed, make one word of the other.
  levenshteinAtMost =
    edits: left: right:
    let
      rest = text: substring 1 (stringLength text) text;
      same = left != "" && right != "" && substring 0 1 left == substring 0 1 right;
      apart = stringLength left - stringLength right;
    in
    if apart > edits || -apart > edits then
      false
    else if same then
      levenshteinAtMost edits (rest left) (rest right)
    else if left == "" || right == "" then
      true
    else
      edits > 0
      && any (pair: levenshteinAtMost (edits - 1) (head pair) (elemAt pair 1)) [
        [
          (rest left)
          right
        ]
        [
          left
          (rest right)
        ]
        [
          (rest left)
          (rest right)
        ]
      ];

  declare =
    left: right:
    left
    // right
    // mapAttrs (
      name: option:
      if kind option == "option" || kind right.${name} == "option" then
        throw "The option `${name}' is declared twice."
      else
        declare option right.${name}
    ) (intersectAttrs right left);
in
{
  inherit
    types
    mkOption
    mkIf
    mkMerge
    mkOverride
    ;
  strings = { inherit levenshteinAtMost; };
  mkDefault = mkOverride 1000;
  mkForce = mkOverride 50;
  mkBefore = mkOrder 500;
  mkOptionType =
    {
      name,
      check ? _: true,
      merge,
      ...
    }:
    {
      inherit name check;
      merge = path: values: merge path (map (value: { inherit value; }) values);
    };
  mergeEqualOption = path: definitions: equal path (map (definition: definition.value) definitions);
  getExe = package: "${package}/bin/${package.meta.mainProgram or package.name}";
  literalExpression = text: text;
  mkEnableOption =
    name:
    mkOption {
      type = types.bool;
      default = false;
      description = "Whether to enable ${name}.";
    };

  evalModules =
    { modules, specialArgs }:
    let
      called =
        module:
        let
          made = if isFunction module then module (specialArgs // { inherit config lib; }) else module;
        in
        concatMap called (made.imports or [ ])
        ++ [
          {
            key = made.key or null;
            options = made.options or { };
            config = made.config or (removeAttrs made [ "imports" "options" ]);
          }
        ];
      once = foldl' (
        seen: module: if module.key != null && any (one: one.key == module.key) seen then seen else seen ++ [ module ]
      ) [ ] (concatMap called modules);
      lib = import ./lib.nix;
      config = settle [ ] (foldl' declare { } (map (module: module.options) once)) (map (module: module.config) once);
    in
    {
      inherit config;
    };
}
