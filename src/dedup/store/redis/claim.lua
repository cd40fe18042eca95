local by, lease, window, redrives, alone = struct.unpack('<c16I8I8I4B', ARGV[1])
local start, take, busy, answer = not live, true, false, nil
if live then
  if state == CLAIMED and token == by then
    -- The same claim again, since its answer was lost: nothing is counted, the deadline is set anew.
    take = false
  elseif state == CLAIMED and now < till then busy = true
  elseif state == DONE then return 'D' .. digest
  elseif redrives == generation + 1 then start = true
  elseif state == PARKED then return 'P' .. digest
  -- The run that released it: a claim of its own that came late is not a new one.
  elseif state == RELEASED and (token == by or now < till) then busy = true
  elseif (state == CLAIMED or suspect == 1) and alone == 0 then return 'S'
  elseif state == CLAIMED then before, suspect = VANISHED, 1
  end
  if busy then return struct.pack('<c1I8', 'B', max(till - now, 0)) .. digest end
end
if start then
  -- Attempt 1; of the last record only the fence.
  before, suspect, interruptions, attempt, generation, fence, digest = FIRST, 0, 0, 0, redrives, fence or 0, ''
end
if take then
  -- The claim is counted here, before the handler runs.
  state, retain, token = CLAIMED, window, by
  fence, attempt = min(max(now, fence + 1), FOREVER), min(attempt + 1, 4294967295)
  if digest == '' then digest = string.sub(ARGV[1], 38) end
end
-- A computed length of zero is not "no lease": it is one microsecond.
till = min(now + max(lease, 1), FOREVER)
answer = struct.pack('<c1I8I4B', 'A', fence, attempt, before) .. digest
