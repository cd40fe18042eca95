local by, lease, window, redrives, alone = struct.unpack('<c16I8I8I4B', ARGV[1])
local body = string.sub(ARGV[1], 38)

local function acquired()
  keep()
  return struct.pack('<c1I8I4B', 'A', fence, attempt, before) .. digest
end

local function busy() return struct.pack('<c1I8', 'B', math.max(till - now, 0)) .. digest end

-- The claim is counted here, before the handler runs.
local function take(as)
  state, before, till, retain, token = CLAIMED, as, after(lease), window, by
  fence = math.min(math.max(now, fence + 1), FOREVER)
  attempt = math.min(attempt + 1, 4294967295)
  if digest == '' then digest = body end
  return acquired()
end

-- Attempt 1, of the last record only the fence.
local function start()
  attempt, interruptions, suspect, generation, fence, digest = 0, 0, 0, redrives, fence or 0, ''
  return take(0)
end

if not live then return start() end
if state == CLAIMED then
  -- The same claim again, since its answer was lost: nothing is counted, the deadline is set anew.
  if token == by then
    till = after(lease)
    return acquired()
  end
  if now < till then return busy() end
end
if state == DONE then return 'D' .. digest end
if redrives == generation + 1 then return start() end
if state == PARKED then return 'P' .. digest end
-- The run that released it: a claim of its own that came late is not a new one.
if state == RELEASED and (token == by or now < till) then return busy() end
if (state == CLAIMED or suspect == 1) and alone == 0 then return 'S' end
if state == RELEASED then return take(before) end
suspect = 1
return take(VANISHED)
