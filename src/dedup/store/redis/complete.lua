local by, order, window = struct.unpack('<c16I8I8', ARGV[1])
local answer = 0
if not live then
  -- The work is done, and the holder knows whether its lease held.
  before, interruptions, attempt, generation, till, digest = 0, 0, 0, 0, 0, ''
  fence, token, answer = math.max(fence or 0, order), by, 2
elseif token ~= by then return 1
elseif state == DONE then return 0
elseif state ~= CLAIMED then return 1
end
state, suspect, till, retain = DONE, 0, 0, window
keep()
return answer
