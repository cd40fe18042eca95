-- guestlist: the claims of a dedup store, format 1. Safe to apply again at any time.
--
-- All times and lengths are microseconds of this server's clock, as `bigint`: the protocol's own
-- arithmetic, without time zones. Every statement of the store is one call of `step`.

do $$
begin
    -- Not `create schema if not exists`: that asks for CREATE on the database even if it is there.
    if to_regnamespace('{schema}') is null then
        create schema "{schema}";
    end if;
    -- Fences grow over lost records by the sequence, and by the clock over a lost sequence.
    if to_regclass('"{schema}"."{table}_fence"') is null then
        execute format('create sequence "{schema}"."{table}_fence" as bigint start with %s',
                       (extract(epoch from clock_timestamp()) * 1000000)::bigint);
    end if;
end $$;

create table if not exists "{schema}"."{table}" (
    key           uuid     primary key,
    token         uuid     not null,
    digest        uuid,
    fence         bigint   not null,
    attempt       bigint   not null,
    generation    bigint   not null,
    -- Claimed: the end of the lease. Released: the end of the backoff. Otherwise 0.
    until         bigint   not null,
    retain        bigint   not null,
    kept_until    bigint   not null,
    -- In steps of 67 s (2^26 µs), so that an update seldom changes it: an index on the time itself would
    -- be written at each claim, renewal and completion, and no update would be heap-only.
    sweep_after   bigint   generated always as (kept_until >> 26) stored,
    version       smallint not null,
    -- 0 claimed, 1 released, 2 parked, 3 done
    state         smallint not null,
    -- 0 first, 1 failed, 2 handed back, 3 vanished
    before        smallint not null,
    interruptions smallint not null,
    suspect       boolean  not null
) with (fillfactor = 60);

create index if not exists "{table}_sweep_after" on "{schema}"."{table}" (sweep_after);

-- One step of the protocol's machine, by the same rules in the same order as `protocol::Machine`.
--
-- op: 0 claim, 1 renew, 2 complete, 3 release as failed, 4 deferred, 5 not started, 6 interrupted,
-- 7 dead-lettered.
-- answer: 0 acquired, 1 in progress, 2 suspect, 3 parked, 4 done; 10 yes, 11 lost, 12 gone;
-- 20 locked: another transaction changes the record right now, ask again; 21 a record of another format.
create or replace function "{schema}"."{table}_step_v2"(
    op int, its_key uuid, its_token uuid, its_fence bigint, length bigint, keep bigint,
    its_generation bigint, its_digest uuid, alone boolean,
    out answer smallint, out busy_for bigint, out got_fence bigint, out got_attempt bigint,
    out got_before smallint, out got_digest uuid
) language plpgsql volatile as $step$
declare
    r      "{schema}"."{table}"%rowtype;
    at     bigint;
    there  boolean;
    live   boolean;
    mine   boolean;
    starts boolean;
    -- A claim looks first: most of its refusals change nothing, and need no lock.
    lock   boolean := op <> 0;
begin
    -- Most claims are of new ids, and made here by one statement. The look is for the others: to find the conflict by
    -- inserting costs a number of the sequence, which everybody shares.
    if op = 0 then
        at := extract(epoch from clock_timestamp()) * 1000000;
        insert into "{schema}"."{table}"
            (key, token, digest, fence, attempt, generation, until, retain, kept_until, version,
             state, before, interruptions, suspect)
        select its_key, its_token, its_digest, nextval('"{schema}"."{table}_fence"'), 1, its_generation,
               at + greatest(length, 1), keep, at + greatest(keep, length, 1), 1, 0, 0, 0, false
         where not exists (select from "{schema}"."{table}" t where t.key = its_key)
        on conflict (key) do nothing
        returning fence, attempt, before, digest into got_fence, got_attempt, got_before, got_digest;
        if found then
            answer := 0;
            return;
        end if;
    end if;
    loop
        -- Nobody waits for a row: an inbox transaction in doubt may hold one for long, and a statement
        -- that waits would keep the other claims beside it waiting, and their connection.
        if lock then
            select * into r from "{schema}"."{table}" t where t.key = its_key for update skip locked;
            there := found;
            if not there then
                perform 1 from "{schema}"."{table}" t where t.key = its_key;
                if found then
                    answer := 20;
                    return;
                end if;
            end if;
        else
            select * into r from "{schema}"."{table}" t where t.key = its_key;
            there := found;
        end if;
        if there and r.version <> 1 then
            answer := 21;
            return;
        end if;

        -- After the record is read or locked: never the time at which the transaction began.
        at := extract(epoch from clock_timestamp()) * 1000000;
        live := there and at < r.kept_until;
        mine := live and r.token = its_token;

        if op = 0 then
            starts := not live or (r.state <> 3 and its_generation = r.generation + 1);
            if mine and r.state = 0 then
                answer := 0;
                r.until := at + greatest(length, 1);
            elsif live and r.state = 0 and at < r.until then
                answer := 1;
            elsif live and r.state = 3 then
                answer := 4;
            elsif starts then
                answer := 0;
                r.fence := coalesce(r.fence, 0);
                r.attempt := 0;
                r.generation := its_generation;
                r.before := 0;
                r.suspect := false;
                r.interruptions := 0;
                r.digest := null;
            elsif r.state = 2 then
                answer := 3;
            elsif r.state = 1 and (mine or at < r.until) then
                answer := 1;
            elsif (r.suspect or r.state = 0) and not alone then
                answer := 2;
            else
                answer := 0;
                if r.state = 0 then
                    r.suspect := true;
                    r.before := 3;
                end if;
            end if;
            if answer <> 0 then
                busy_for := greatest(r.until - at, 0);
                got_digest := r.digest;
                return;
            end if;
            if there and not lock then
                lock := true;
                continue;
            end if;
            if not (mine and r.state = 0) then
                r.token := its_token;
                r.fence := greatest(nextval('"{schema}"."{table}_fence"'), r.fence + 1);
                r.attempt := least(r.attempt + 1, 4294967295);
                r.state := 0;
                r.until := at + greatest(length, 1);
                r.digest := coalesce(r.digest, its_digest);
                r.retain := keep;
            end if;
            got_fence := r.fence;
            got_attempt := r.attempt;
            got_before := r.before;
            got_digest := r.digest;
        elsif op = 2 and not live then
            -- The work is done: remember it, also if the claim was lost.
            answer := 12;
            r.token := its_token;
            r.fence := greatest(r.fence, its_fence);
            r.attempt := 0;
            r.generation := 0;
            r.before := 0;
            r.suspect := false;
            r.interruptions := 0;
            r.digest := null;
        elsif not live then
            answer := 12;
            return;
        elsif not mine or (r.state <> 0 and (op = 1 or r.state = case op when 2 then 1 else 3 end
                                             or (op = 2 and r.state = 2))) then
            answer := 11;
            return;
        elsif r.state <> 0 then
            -- Asked again, since the answer was lost.
            answer := 10;
            return;
        else
            answer := 10;
            if op = 1 then
                r.until := at + greatest(length, 1);
            elsif op = 7 then
                r.state := 2;
                r.until := 0;
                r.suspect := false;
            elsif op > 2 then
                r.state := 1;
                r.until := case when op in (3, 4) and length > 0 then at + length else 0 end;
                r.before := case op when 3 then 1 when 4 then 2 when 6 then 2 else r.before end;
                if op in (4, 5) or (op = 6 and r.interruptions < 3) then
                    r.attempt := greatest(r.attempt - 1, 0);
                end if;
                r.interruptions := case op when 3 then 0 when 4 then 0
                    when 6 then least(r.interruptions + 1, 255) else r.interruptions end;
            end if;
        end if;
        if op = 2 then
            r.state := 3;
            r.until := 0;
            r.suspect := false;
            r.retain := length;
        end if;
        -- A released one is kept from the end of its backoff: that is when its message comes back. It was not, in
        -- `step_v1`, which stays where it is for consumers of an earlier release.
        r.kept_until := case r.state
            when 0 then greatest(at + greatest(r.retain, 1), r.until)
            else greatest(at, r.until) + greatest(r.retain, 1) end;

        if there then
            update "{schema}"."{table}" t
               set token = r.token, digest = r.digest, fence = r.fence, attempt = r.attempt,
                   generation = r.generation, until = r.until, retain = r.retain,
                   kept_until = r.kept_until, state = r.state, before = r.before,
                   interruptions = r.interruptions, suspect = r.suspect
             where t.key = its_key;
            return;
        end if;
        insert into "{schema}"."{table}"
            (key, token, digest, fence, attempt, generation, until, retain, kept_until, version,
             state, before, interruptions, suspect)
        values (its_key, r.token, r.digest, r.fence, r.attempt, r.generation, r.until, r.retain,
                r.kept_until, 1, r.state, r.before, r.interruptions, r.suspect)
        on conflict (key) do nothing;
        if found then
            return;
        end if;
        -- Another one was first. Its record is there to be read now.
    end loop;
end $step$;
