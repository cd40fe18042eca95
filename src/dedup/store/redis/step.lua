-- One step of the protocol's machine for each key, by the argument at its place, and by the same rules in the same order as
-- `protocol::Machine`. The answer to one step, or a list of answers.
--
-- A record, little-endian, 61 or 77 bytes:
--   B  version: 1                     I4 attempt            I8 retain, µs
--   B  state: the constants below     I4 generation         I8 kept_until, µs of the server's clock
--   B  before: 0 first, 1 failed,     I8 fence              c16 token
--      2 handed back, 3 vanished      I8 till: deadline     c16 digest, or nothing
--   B  suspect: 0, 1                     or not_before
--   B  interruptions
-- Numbers are doubles here, exact up to 2^53 - 1: that many µs are "for ever". No functions: to make them, at each
-- run, takes as long as all the rest.
local FORMAT, FOREVER = '<BBBBBI4I4I8I8I8I8c16', 9007199254740991
local CLAIMED, RELEASED, PARKED, DONE = 0, 1, 2, 3
local FIRST, FAILED, HANDED_BACK, VANISHED = 0, 1, 2, 3
local YES, LOST, GONE = 0, 1, 2
local min, max, sub, pack, unpack = math.min, math.max, string.sub, struct.pack, struct.unpack
-- What is wrong with one key is the answer to its step alone.
local call = redis.pcall

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local answers = {}

-- `break` ends a step: its answer is there, and nothing is to be written.
for i, key in ipairs(KEYS) do repeat
  local ask = ARGV[i]
  local what = sub(ask, 1, 1)
  local old = call('GET', key)

  local version, state, before, suspect, interruptions, attempt, generation, fence, till, retain, kept, token
  local digest, live = '', false
  if old then
    if type(old) == 'table' then answers[i] = old break end
    version = string.byte(old)
    if version ~= 1 or (#old ~= 61 and #old ~= 77) then answers[i] = 'V' .. (version or 0) break end
    version, state, before, suspect, interruptions, attempt, generation, fence, till, retain, kept, token =
      unpack(FORMAT, old)
    if state > DONE then answers[i] = 'V1' break end
    digest = sub(old, 62)
    -- A record that is past its time is none, but for its fence.
    live = now < kept
  end

  if what == 'c' then  -- claim
    local by, lease, window, redrives, alone = unpack('<c16I8I8I4B', ask, 2)
    local start, take, busy = not live, true, false
    if live then
      if state == CLAIMED and token == by then
        -- The same claim again, since its answer was lost: nothing is counted, the deadline is set anew.
        take = false
      elseif state == CLAIMED and now < till then busy = true
      elseif state == DONE then answers[i] = 'D' .. digest break
      elseif redrives == generation + 1 then start = true
      elseif state == PARKED then answers[i] = 'P' .. digest break
      -- The run that released it: a claim of its own that came late is not a new one.
      elseif state == RELEASED and (token == by or now < till) then busy = true
      elseif (state == CLAIMED or suspect == 1) and alone == 0 then answers[i] = 'S' break
      elseif state == CLAIMED then before, suspect = VANISHED, 1
      end
      if busy then answers[i] = pack('<c1I8', 'B', max(till - now, 0)) .. digest break end
    end
    if start then
      -- Attempt 1; of the last record only the fence.
      before, suspect, interruptions, attempt, generation, fence, digest = FIRST, 0, 0, 0, redrives, fence or 0, ''
    end
    if take then
      -- The claim is counted here, before the handler runs.
      state, retain, token = CLAIMED, window, by
      fence, attempt = min(max(now, fence + 1), FOREVER), min(attempt + 1, 4294967295)
      if digest == '' then digest = sub(ask, 39) end
    end
    -- A computed length of zero is not "no lease": it is one microsecond.
    till = min(now + max(lease, 1), FOREVER)
    answers[i] = pack('<c1I8I4B', 'A', fence, attempt, before) .. digest

  elseif what == 'd' then  -- done
    local by, order, window = unpack('<c16I8I8', ask, 2)
    answers[i] = YES
    if not live then
      -- The work is done, and the holder knows whether its lease held.
      before, interruptions, attempt, generation, digest = FIRST, 0, 0, 0, ''
      fence, token, answers[i] = max(fence or 0, order), by, GONE
    elseif token ~= by then answers[i] = LOST break
    elseif state == DONE then break
    elseif state ~= CLAIMED then answers[i] = LOST break
    end
    state, suspect, till, retain = DONE, 0, 0, window

  elseif what == 'n' then  -- renew
    local by, lease = unpack('<c16I8', ask, 2)
    answers[i] = YES
    if not live then answers[i] = GONE break end
    if token ~= by or state ~= CLAIMED then answers[i] = LOST break end
    till = min(now + max(lease, 1), FOREVER)

  elseif what == 'r' then  -- release
    -- 0 failed, 1 deferred, 2 not started, 3 interrupted, 4 dead-lettered
    local by, why, delay = unpack('<c16BI8', ask, 2)
    answers[i] = YES
    if not live then answers[i] = GONE break end
    if token ~= by or state == DONE then answers[i] = LOST break end
    if state ~= CLAIMED then break end
    local given_back = max(attempt - 1, 0)
    state, till = RELEASED, 0
    if delay > 0 then till = min(now + delay, FOREVER) end
    if why == 0 then
      before, interruptions = FAILED, 0
    elseif why == 1 then
      before, interruptions, attempt = HANDED_BACK, 0, given_back
    elseif why == 2 then
      attempt = given_back
    elseif why == 3 then
      -- Three in a row give the attempt back.
      before = HANDED_BACK
      if interruptions < 3 then attempt = given_back end
      interruptions = min(interruptions + 1, 255)
    else
      state, suspect = PARKED, 0
    end

  elseif what == 'i' then  -- inspect
    answers[i] = live and old
    break

  else  -- forget
    local gone = call('DEL', key)
    answers[i] = live and 1 or 0
    if type(gone) == 'table' then answers[i] = gone end
    break
  end

  -- Kept for `retain` from this change on, a claim at least to its deadline, a released one for `retain` from the end of
  -- its backoff. Redis collects a minute after the record's own time, which alone decides: until then the fence is known.
  kept = now
  if state == RELEASED then kept = max(now, till) end
  kept = min(kept + max(retain, 1), FOREVER)
  if state == CLAIMED then kept = max(kept, till) end
  local written = call('SET', key,
    pack(FORMAT, 1, state, before, suspect, interruptions, attempt, generation, fence, till, retain, kept, token)
      .. digest,
    'PX', string.format('%d', math.ceil((kept - now) / 1000) + 60000))
  if written['err'] then answers[i] = written end
until true end

if #answers == 1 then return answers[1] end
return answers
