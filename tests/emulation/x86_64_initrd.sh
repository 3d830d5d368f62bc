#!/bin/busybox sh
# The first process of the emulated machine: mounts its disks, runs the command, switches off.
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /root
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
for module in scsi_common scsi_mod libata ata_piix sd_mod; do insmod /$module.ko; done
until [ -b /dev/sdb ]; do sleep 1; done
mount -o ro /dev/sda /root
mount /dev/sdb /root/work
for folder in proc sys dev; do mount --move /$folder /root/$folder; done
mkdir -p /root/dev/shm
for folder in tmp run dev/shm; do mount -t tmpfs none /root/$folder; done
chroot /root /bin/sh /work/run.sh >/root/dev/ttyS0 2>&1
umount /root/work
poweroff -f
