-- 0 failed, 1 deferred, 2 not started, 3 interrupted, 4 dead-lettered
local by, why, delay = struct.unpack('<c16BI8', ARGV[1])
if not live then return 2 end
if token ~= by or state == DONE then return 1 end
if state ~= CLAIMED then return 0 end

local given_back = math.max(attempt - 1, 0)
state, till = RELEASED, 0
if delay > 0 then till = after(delay) end
if why == 0 then
  before, interruptions = 1, 0
elseif why == 1 then
  before, interruptions, attempt = 2, 0, given_back
elseif why == 2 then
  attempt = given_back
elseif why == 3 then
  -- Three in a row give the attempt back.
  before = 2
  if interruptions < 3 then attempt = given_back end
  interruptions = math.min(interruptions + 1, 255)
else
  state, suspect = PARKED, 0
end
keep()
return 0
