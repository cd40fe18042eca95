-- What every script begins with. A record, little-endian, 61 or 77 bytes:
--   B  version: 1                     I4 attempt            I8 retain, µs
--   B  state: the constants below     I4 generation         I8 kept_until, µs of the server's clock
--   B  before: 0 first, 1 failed,     I8 fence              c16 token
--      2 handed back, 3 vanished      I8 till: deadline     c16 digest, or nothing
--   B  suspect: 0, 1                     or not_before
--   B  interruptions
-- Numbers are doubles here, exact up to 2^53 - 1: that many µs are "for ever".
local FORMAT, FOREVER = '<BBBBBI4I4I8I8I8I8c16', 9007199254740991
local CLAIMED, RELEASED, PARKED, DONE = 0, 1, 2, 3
local VANISHED = 3

local key, clock = KEYS[1], redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local old = redis.call('GET', key)

local version, state, before, suspect, interruptions, attempt, generation, fence, till, retain, kept, token
local digest = ''
if old then
  version = string.byte(old)
  if version ~= 1 or (#old ~= 61 and #old ~= 77) then return 'V' .. (version or 0) end
  version, state, before, suspect, interruptions, attempt, generation, fence, till, retain, kept, token =
    struct.unpack(FORMAT, old)
  if state > DONE then return 'V1' end
  digest = string.sub(old, 62)
end
-- A record that is past its time is none, but for its fence.
local live = old and now < kept

-- A computed length of zero is not "no lease": it is one microsecond.
local function after(length) return math.min(now + math.max(length, 1), FOREVER) end

-- Redis collects a minute after the record's own time, which alone decides: until then the fence is known.
local function write()
  redis.call('SET', key,
    struct.pack(FORMAT, 1, state, before, suspect, interruptions, attempt, generation, fence, till, retain, kept, token)
      .. digest,
    'PX', math.ceil((kept - now) / 1000) + 60000)
end

local function keep()
  kept = after(retain)
  if state <= RELEASED then kept = math.max(kept, till) end
  write()
end
