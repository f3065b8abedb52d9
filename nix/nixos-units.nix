# Units as nix/units.nix gives them, as NixOS takes them: { services, sockets, timers, ... } for `systemd`. What an
# administrator sets there wins over a value of ours, and is added to a list of ours.
{ lib, units }:
let
  inherit (builtins)
    attrNames
    concatMap
    elem
    filter
    groupBy
    head
    isString
    length
    listToAttrs
    mapAttrs
    match
    removeAttrs
    split
    ;

  # A unit's kind by its suffix: the options of NixOS, and the section beside [Unit] and [Install].
  kinds = {
    service = "Service";
    socket = "Socket";
    timer = "Timer";
    path = "Path";
  };

  # Keys that systemd adds up, in their order, where an empty value begins the list again.
  lists = [
    "BindPaths"
    "BindReadOnlyPaths"
    "DeviceAllow"
    "EnvironmentFile"
    "ExecCondition"
    "ExecStartPost"
    "ExecStartPre"
    "ExecStop"
    "ExecStopPost"
    "InaccessiblePaths"
    "LoadCredential"
    "ReadOnlyPaths"
    "ReadWritePaths"
    "SuccessExitStatus"
    "SupplementaryGroups"
    "SystemCallFilter"
  ];

  # Keys of [Unit] that NixOS has options for, which other modules add to.
  dependencies = {
    After = "after";
    Before = "before";
    BindsTo = "bindsTo";
    Conflicts = "conflicts";
    OnFailure = "onFailure";
    PartOf = "partOf";
    Requires = "requires";
    Requisite = "requisite";
    Wants = "wants";
  };

  words = text: filter (word: isString word && word != "") (split "[[:space:]]+" text);
  assignment =
    line:
    let
      found = match "([^=]+)=(.*)" line;
    in
    if found == null then throw "a unit's line is no assignment: ${line}" else found;

  # { Key = [ value ... ]; ... } of a section's lines; no comments.
  keysOf =
    lines:
    mapAttrs (_: map (pair: builtins.elemAt pair 1)) (
      groupBy head (map assignment (filter (line: match "[#;].*" line == null && line != "") lines))
    );

  # Ours first: of two SystemCallFilter= lines the later one wins.
  valueOf =
    key: values:
    if elem key lists || length values > 1 then lib.mkBefore values else lib.mkDefault (head values);
  config = keys: mapAttrs valueOf keys;

  # By name, so that an administrator can set one alone.
  environmentOf =
    lines:
    listToAttrs (
      map (
        word:
        let
          pair = assignment word;
        in
        if match "[^\"'\\\\]*" word == null then
          throw "an Environment= of ours is quoted: ${word}"
        else
          {
            name = head pair;
            value = builtins.elemAt pair 1;
          }
      ) (concatMap words lines)
    );

  unit =
    kind: sections:
    let
      named = listToAttrs (
        map (section: {
          inherit (section) name;
          value = keysOf section.lines;
        }) sections
      );
      own = named.${kinds.${kind}} or { };
      about = named.Unit or { };
      install = named.Install or { };
      variables = environmentOf (own.Environment or [ ]);
      ofUnit = filter (key: builtins.hasAttr key about) (attrNames dependencies);
    in
    {
      wantedBy = concatMap words (install.WantedBy or [ ]);
      unitConfig = config (removeAttrs about (attrNames dependencies ++ [ "Description" ]));
      "${kind}Config" = config (removeAttrs own [ "Environment" ]);
    }
    // listToAttrs (
      map (key: {
        name = dependencies.${key};
        value = concatMap words about.${key};
      }) ofUnit
    )
    // (if about ? Description then { description = lib.mkDefault (head about.Description); } else { })
    // (
      if kind == "service" then
        {
          environment = mapAttrs (_: lib.mkDefault) (removeAttrs variables [ "PATH" ]);
          # NixOS makes PATH= of this, and adds what an administrator names and a few tools, systemctl among them.
          path = map (folder: builtins.head (match "(.*)/bin" folder)) (
            if variables ? PATH then filter isString (split ":" variables.PATH) else [ ]
          );
        }
      else
        { }
    );

  ofKind =
    kind:
    listToAttrs (
      concatMap (
        name:
        let
          base = match "(.*)\\.${kind}" name;
        in
        if base == null then
          [ ]
        else
          [
            {
              name = head base;
              value = unit kind units.${name};
            }
          ]
      ) (attrNames units)
    );
in
listToAttrs (
  map (kind: {
    name = "${kind}s";
    value = ofKind kind;
  }) (attrNames kinds)
)
