#!/bin/sh
# Repeats recorded calls of the C kernels on an x86-64 CPU that Bochs emulates: x86_64.sh MODEL MARCH
#
# MODEL is a name of Bochs's, MARCH what gcc calls that CPU. README.md says what is needed and what was seen.
# EMULATION_DIR: where all that is made stays. EXCLUDED_FEATURES: what the CPU shall lack besides, as Bochs names it.
set -eu
model=$1 march=$2

repository=$(cd "$(dirname "$0")/../.." && pwd)
here=$repository/tests/emulation
dir=${EMULATION_DIR:-$HOME/.cache/promptmill-emulation}/x86_64
# Linux does not start on Bochs 3.0 with them: AMX without a way to refuse it to a process, and registers that a system
# management interrupt does not restore.
excluded="amx, amx_bf16, amx_int8, cet, invpcid, la57, pcid, pks, uintr, waitpkg${EXCLUDED_FEATURES:+, $EXCLUDED_FEATURES}"
mkdir -p "$dir"
cd "$dir"

make_root() { # a Debian with Python and gcc; and from the next one Bochs, its firmware and a kernel
  debootstrap --variant=minbase \
    --include=python3,gcc,libc6-dev,busybox-static,cpio,isolinux,syslinux-common,xorriso bookworm root.new
  sed -n 's/^deb \(\S*\) bookworm main.*/deb \1 trixie main\ndeb-src \1 trixie main/p' \
    root.new/etc/apt/sources.list >root.new/etc/apt/sources.list.d/trixie.list
  # shellcheck disable=SC2016
  chroot root.new sh -c 'cd /tmp && apt-get update &&
    kernel=$(apt-cache show linux-image-cloud-amd64/trixie | sed -n "s/^Depends: \(linux-image[^ ]*\).*/\1/p") &&
    apt-get download "$kernel"/trixie bochsbios/trixie vgabios/trixie && apt-get source --tar-only bochs/trixie &&
    for package in *.deb; do dpkg-deb -x "$package" /emulator; done && apt-get clean'
  mkdir root.new/work
  mv root.new root
}

make_bochs() { # Debian's own has a debugger built in, which takes its time at every instruction
  mkdir -p source
  tar -xf root/tmp/bochs_*.orig.tar.xz -C source --strip-components=1
  (cd source && ./configure CFLAGS='-O3 -march=native' CXXFLAGS='-O3 -march=native' --with-nogui --disable-docbook \
    --disable-plugins --enable-cpu-level=6 --enable-x86-64 --enable-avx --enable-evex --enable-amx \
    --enable-all-optimizations --enable-pci --enable-memtype --enable-protection-keys --enable-cet --enable-uintr \
    --enable-vmx=2 --enable-svm && make -j"$(nproc)")
  cp source/bochs .
}

make_boot_cd() { # the kernel, and the drivers of the disks
  mkdir -p root/boot.new/initrd/bin root/boot.new/cd
  for module in scsi_common scsi_mod libata ata_piix sd_mod; do
    xz -dc "$(find root/emulator -name $module.ko.xz)" >root/boot.new/initrd/$module.ko
  done
  cp root/bin/busybox root/boot.new/initrd/bin/
  cp "$here/x86_64_initrd.sh" root/boot.new/initrd/init
  chroot root sh -c 'cd /boot.new/initrd && find . | cpio -o -H newc --quiet >../cd/initrd'
  cp root/emulator/boot/vmlinuz-* root/boot.new/cd/vmlinuz
  cp root/usr/lib/ISOLINUX/isolinux.bin root/usr/lib/syslinux/modules/bios/ldlinux.c32 root/boot.new/cd/
  cat >root/boot.new/cd/isolinux.cfg <<END
default linux
label linux
kernel vmlinuz
append initrd=initrd console=ttyS0,115200 mitigations=off nokaslr nopti tsc=reliable clocksource=tsc audit=0
END
  chroot root xorriso -as mkisofs -quiet -o /boot.iso -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 \
    -boot-info-table /boot.new/cd
  mv root/boot.iso . && rm -r root/boot.new
}

make_disk() { # NAME FOLDER SIZE
  rm -f "$1"
  mke2fs -q -t ext4 -O ^has_journal -d "$2" "$1" "$3"
}

make_work_disk() { # what is recorded here, and the kernels for that CPU
  rm -rf root/work && mkdir -p root/work/kernels
  (cd "$repository" && .venv/bin/python -m tests.emulation.record "$dir/root/work/calls")
  cp "$here/replay.py" root/work/
  cp -r "$repository/engine/kernels" root/work/sources
  for kernel in attention matmul matmul_int8 rows sampling; do
    contraction=-ffp-contract=fast
    [ $kernel = matmul_int8 ] && contraction=-ffp-contract=off
    chroot root gcc "-march=$march" $contraction -O3 -std=gnu11 -fPIC -shared -fno-math-errno -fno-trapping-math \
      -fopenmp -o /work/kernels/$kernel.so /work/sources/$kernel.c -lm
  done
  cat >root/work/run.sh <<END
grep -m2 -E '^(model name|flags)' /proc/cpuinfo
gcc -march=native -Q --help=target | grep -m1 -- -march=
cd /work && OMP_NUM_THREADS=1 python3 replay.py calls kernels
END
  make_disk work.img root/work 1G
  rm -rf root/work && mkdir root/work
}

run() {
  rm -f "$model.txt" ./*.lock
  cat >bochsrc <<END
config_interface: textconfig
display_library: nogui
romimage: file=root/emulator/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=root/emulator/usr/share/vgabios/vgabios.bin
cpu: model=$model, count=1, ips=100000000, exclude_features="$excluded"
memory: guest=2048, host=2048
boot: cdrom
ata0-master: type=disk, path=system.img, mode=flat
ata0-slave: type=disk, path=work.img, mode=flat
ata1: enabled=1
ata1-master: type=cdrom, path=boot.iso, status=inserted
com1: enabled=1, mode=file, dev=$model.txt
clock: sync=none
log: bochs.log
panic: action=fatal
END
  ./bochs -q -f bochsrc >bochs.out 2>&1 || true # it says 1 where the machine was switched off
  grep -A9999 '^model name' "$model.txt"
}

[ -d root ] || make_root
[ -x bochs ] || make_bochs
[ -f boot.iso ] || make_boot_cd
[ -f system.img ] || make_disk system.img root 2G
make_work_disk
run
