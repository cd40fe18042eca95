local by, lease = struct.unpack('<c16I8', ARGV[1])
if not live then return 2 end
if token ~= by or state ~= CLAIMED then return 1 end
till = after(lease)
keep()
return 0
