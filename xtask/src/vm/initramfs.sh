#!/busybox sh
# The first process of a guest: finds the disks, and turns into the second one, in the file system of the first disk.
/busybox mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
while read -r module; do
    /busybox insmod "/modules/$module"
done </modules/order
/busybox mount -t ext4 /dev/vda /new
/busybox mount -t ext4 -o ro /dev/vdb /new/payload
/busybox mount --move /dev /new/dev
exec /busybox switch_root /new /payload/guest.sh
