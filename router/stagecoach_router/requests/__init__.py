"""One request on its way: what was asked, how far it is, and the stream of what its caller gets.

These objects carry it, and no others:

    GenerateRequest  what came over the wire; let go of as soon as it has been read
    Request          what was asked of this router, checked and in tokens; it never changes, so the journal may keep it
    SamplingParams   the part of it that the SDK shares: how tokens are chosen
    RequestState     everything that changes about the request, and the stream of its output
    OutputLog        all of that stream, packed: it may be long, and is kept for who comes back
    OutputReader     one call's place in that stream: a request may be read again, or by two calls
    Demand           who wants the request, and until when
    Sequence         one completion's token log, with what scheduling and sampling know of it; knows no text
    Completion       one completion's text: detokenizing and stop conditions; knows no scheduling

Where bias or penalties are asked for, the Sequence also counts its tokens (TokenCounts).
"""
