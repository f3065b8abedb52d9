# shellcheck shell=bash
# Part of the wrapper for GPUs: finds the NVIDIA driver's libraries, which belong to the machine and not to the store.
# Exit status 75: the driver may come later, as at boot. 2: YAP_TEXT_DRIVER_LIB must be corrected.
if [[ "${1-}" == @(serve|quantize) && "${2-}" != @(-h|--help) ]]; then
  if [[ ! -e /proc/driver/nvidia/version && "${YAP_TEXT_DEVICE-}" != cuda ]]; then
    echo "yap-text: no NVIDIA driver is loaded on this machine; without a GPU: nix run .#$1-cpu" >&2
    exit 75
  fi
  driver=/run/opengl-driver/lib
  if [[ -n "${YAP_TEXT_DRIVER_LIB-}" || ! -e $driver/libcuda.so.1 ]]; then
    host="${YAP_TEXT_DRIVER_LIB-}"
    if [[ -z "$host" ]]; then
      for ldconfig in /sbin/ldconfig /usr/sbin/ldconfig; do
        [[ -z "$host" && -x "$ldconfig" ]] || continue
        while IFS= read -r line; do
          if [[ "$line" =~ libcuda\.so\.1\ \(.*x86-64.*\)\ =\>\ (.*)/libcuda\.so\.1$ ]]; then
            host="${BASH_REMATCH[1]}"
          fi
        done < <("$ldconfig" -p)
      done
    fi
    if [[ ! -e "$host/libcuda.so.1" ]]; then
      echo "yap-text: no libcuda.so.1 in ${host:-what ldconfig lists}; name the driver's folder in YAP_TEXT_DRIVER_LIB, or run without a GPU: nix run .#$1-cpu" >&2
      [[ -z "${YAP_TEXT_DRIVER_LIB-}" ]] || exit 2
      exit 75
    fi
    # The host's folder may hold a C library, too, which must not stand in for the one of this Python: links to the
    # driver's files alone.
    driver="${CACHE_DIRECTORY:-${XDG_CACHE_HOME:-$HOME/.cache}/yap-text}/driver"
    mkdir -p "$driver"
    for library in "$host"/lib{cuda,cudadebugger,nvcuvid,nvidia-}*.so*; do
      [[ ! -e "$library" ]] || ln -sf "$library" "$driver/"
    done
    # By the name that a linker asks for: it comes with a driver's development files alone.
    [[ -e "$driver/libcuda.so" ]] || ln -sf libcuda.so.1 "$driver/libcuda.so"
  fi
  export LD_LIBRARY_PATH="$driver:$LD_LIBRARY_PATH" TRITON_LIBCUDA_PATH="$driver"
  # FlashInfer links what it compiles to libcuda, and looks for it below CUDA_HOME alone.
  export FLASHINFER_EXTRA_LDFLAGS="-L$driver${FLASHINFER_EXTRA_LDFLAGS:+ $FLASHINFER_EXTRA_LDFLAGS}"
fi
