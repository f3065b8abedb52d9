# The options of services.yap-text.settings: those of nix/settings.json, with their types, bounds and meanings.
{ lib, known }:
let
  inherit (builtins)
    concatStringsSep
    filter
    isBool
    isFloat
    isInt
    isString
    match
    substring
    toJSON
    ;

  type =
    description: check:
    lib.mkOptionType {
      name = description;
      inherit description check;
      descriptionClass = "nonRestrictiveClause";
      merge = lib.mergeEqualOption;
    };
  choice = concatStringsSep ", ";

  between =
    option: value:
    (option.least or value) <= value
    && value <= (option.most or value)
    && !(option ? above && value <= option.above)
    && !(option ? below && value >= option.below);
  bounds =
    option:
    choice (
      filter (words: words != null) [
        (if option ? least then "at least ${toJSON option.least}" else null)
        (if option ? above then "more than ${toJSON option.above}" else null)
        (if option ? most then "at most ${toJSON option.most}" else null)
        (if option ? below then "less than ${toJSON option.below}" else null)
      ]
    );
  bounded = noun: option: if bounds option == "" then noun else "${noun}, ${bounds option}";

  typeOf =
    option:
    {
      bool = type "true, false, 1 or 0" (value: isBool value || value == 0 || value == 1);
      int = type (bounded "whole number" option) (value: isInt value && between option value);
      number = type (bounded "number" option) (value: (isInt value || isFloat value) && between option value);
      text =
        if option ? pattern then
          type "text that matches ${option.pattern}" (value: isString value && match option.pattern value != null)
        else
          type "text" isString;
      # A path literal would copy the file into the store, which every user of the machine can read.
      path = type "absolute path in quotes, no path literal" (value: isString value && substring 0 1 value == "/");
      choice = type "one of ${choice (map toJSON (option.choices or [ ]))}" (value: builtins.elem value option.choices);
    }
    .${option.type};

  # As the service says it: 1 and 0.
  shown =
    value:
    if isBool value then
      (if value then "1" else "0")
    else if isString value then
      value
    else
      toJSON value;
in
builtins.mapAttrs (
  _: option:
  lib.mkOption {
    type = lib.types.nullOr (typeOf option);
    default = null;
    description =
      option.meaning
      + (if option.default or "" == "" then "" else "\n\nDefault of the service: `${shown option.default}`.");
  }
) known
