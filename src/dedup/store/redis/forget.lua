redis.call('DEL', key)
if live then return 1 end
return 0
