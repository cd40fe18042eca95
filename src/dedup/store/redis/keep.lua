-- What every script that changed the record ends with. Kept for `retain` from this change on, a claim at least to
-- its deadline, a released one for `retain` from the end of its backoff. Redis collects a minute after the record's own
-- time, which alone decides: until then the fence is known.
kept = now
if state == RELEASED then kept = max(now, till) end
kept = min(kept + max(retain, 1), FOREVER)
if state == CLAIMED then kept = max(kept, till) end
redis.call('SET', key,
  struct.pack(FORMAT, 1, state, before, suspect, interruptions, attempt, generation, fence, till, retain, kept, token)
    .. digest,
  'PX', math.ceil((kept - now) / 1000) + 60000)
return answer
