"""The commands of `yap-text`, one file each."""
