# IP addresses as a socket unit takes them. systemd resolves no names.
let
  inherit (builtins)
    all
    elemAt
    filter
    foldl'
    genList
    isString
    length
    match
    split
    ;

  fields = separator: text: filter isString (split separator text);
  octet = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])";
  isIPv4 = text: match "${octet}(\\.${octet}){3}" text != null;

  # The 16-bit groups of one side of "::"; an IPv4 address may stand for the last two.
  groups = text: if text == "" then [ ] else fields ":" text;
  isGroup =
    found: final: place:
    let
      group = elemAt found place;
    in
    match "[0-9a-fA-F]{1,4}" group != null || (final && place == length found - 1 && isIPv4 group);
  width = foldl' (sum: group: sum + (if isIPv4 group then 2 else 1)) 0;
  isIPv6 =
    text:
    let
      sides = map groups (fields "::" text);
      count = length sides;
      valid =
        place:
        let
          side = elemAt sides place;
        in
        all (isGroup side (place == count - 1)) (genList (n: n) (length side));
      total = foldl' (sum: side: sum + width side) 0 sides;
    in
    count <= 2 && all valid (genList (n: n) count) && (if count == 2 then total <= 7 else total == 8);
in
{
  isAddress = text: isIPv4 text || isIPv6 text;

  # For ListenStream=.
  listen = host: port: "${if isIPv6 host then "[${host}]" else host}:${toString port}";

  # What an administrator meant by a `host` that is none.
  hint =
    host:
    {
      "localhost" = "write 127.0.0.1 or ::1";
      "" = "write 0.0.0.0 for every IPv4 address, :: for every address";
      "*" = "write 0.0.0.0 for every IPv4 address, :: for every address";
    }
    .${host} or (
      let
        bare = match "\\[(.*)]" host;
      in
      if bare != null && isIPv6 (builtins.head bare) then
        "write ${builtins.head bare}, without brackets"
      else
        "write the address of an interface, 0.0.0.0 for every IPv4 address or :: for every address"
    );
}
