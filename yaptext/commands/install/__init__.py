"""`yap-text install`: the units and their files on a host that has systemd and is not NixOS.

A unit is replaced whenever it differs: changes to one belong in `systemctl edit`. A config is replaced only if it
was not edited, which its last line shows; keys and tokens are written once.

`make install` builds each version into a folder of its own and runs this command from there. Then the units run
/usr/local/bin/yap-text, a link to the current version.
"""
