"""Names under which anyone may register: a wildcard below one of them would allow everybody.

Our own short list, not a copy of the Public Suffix List: that one changes weekly, and a manifest has to mean the same
on every machine and next year. It holds every top-level domain, the second level of country domains by its usual words
(`co.uk`, `com.au`), and well-known services that hand out names to their customers. A service that is missing here is
a wildcard that is wider than its author may think; the author still had to write it. See docs/decisions/0070.
"""

from __future__ import annotations

from typing import Final

# The second level that registries of countries use: `co.uk`, `com.br`, `ac.jp`, `or.kr`, `gov.in`.
_SECOND_LEVEL_TEXT: Final = """
    ac art asn asso biz co com coop conf ed edu ernet firm gc ge gen go gob gos gouv gov gr gub gv hs id idv in ind
    inf info int k12 kr ltd me med media mil mobi mod muni my name ne net nhs nic nom nome nsn ny or org parl plc
    police press priv pro pub re res rs sc sch school shop sld store tm tv web
"""
# Country domains whose registry also hands out the third level below these words.
_MORE_TEXT: Final = """
    eu.com us.com uk.com uk.net gb.net de.com jp.net jpn.com br.com cn.com ru.com sa.com za.com se.net eu.org
    us.org e164.arpa in-addr.arpa ip6.arpa"""
# Services where a stranger gets a name below the suffix within minutes.
_SERVICES_TEXT: Final = """
    amazonaws.com s3.amazonaws.com elb.amazonaws.com execute-api.amazonaws.com on.aws awsapprunner.com
    amplifyapp.com cloudfront.net elasticbeanstalk.com awsglobalaccelerator.com lambda-url.amazonaws.com
    azurewebsites.net azureedge.net azurefd.net azurecontainer.io azurestaticapps.net azure-api.net azure-mobile.net
    blob.core.windows.net core.windows.net cloudapp.net cloudapp.azure.com trafficmanager.net servicebus.windows.net
    appspot.com run.app a.run.app cloudfunctions.net web.app firebaseapp.com firebaseio.com
    googleusercontent.com withgoogle.com translate.goog blogspot.com storage.googleapis.com
    github.io github.dev app.github.dev gitlab.io bitbucket.io gitpod.io codeberg.page
    pages.dev workers.dev trycloudflare.com r2.dev cloudflare-ipfs.com cloudflareaccess.com
    vercel.app now.sh netlify.app netlify.com herokuapp.com herokudns.com render.com onrender.com fly.dev railway.app
    up.railway.app deno.dev deno.net surge.sh glitch.me replit.app replit.dev repl.co codesandbox.io csb.app
    stackblitz.io webcontainer.io lovable.app modal.run streamlit.app hf.space gradio.live huggingface.app
    digitaloceanspaces.com ondigitalocean.app linodeobjects.com vultrobjects.com wasabisys.com backblazeb2.com
    scw.cloud ovh.net hetzner.cloud fastly.net fastlylb.net edgecompute.app akamaized.net akamaihd.net b-cdn.net
    ngrok.io ngrok.app ngrok.dev ngrok-free.app ngrok-free.dev localtunnel.me loca.lt serveo.net localhost.run
    lhr.life lhr.rocks telebit.io pagekite.me tunnelto.dev zrok.io bore.pub pinggy.io pinggy.link devtunnels.ms
    ts.net beeceptor.com webhook.site requestbin.net pipedream.net interact.sh oast.fun oast.pro oast.live oast.site
    oast.online oast.me burpcollaborator.net oastify.com dnslog.cn ceye.io
    duckdns.org dyndns.org no-ip.org no-ip.com ddns.net hopto.org zapto.org sytes.net afraid.org mooo.com dynu.net
    sslip.io nip.io xip.io traefik.me lvh.me localtest.me vcap.me
    wordpress.com tumblr.com weebly.com wixsite.com squarespace.com myshopify.com notion.site webflow.io carrd.co
    zendesk.com freshdesk.com force.com sharepoint.com onmicrosoft.com atlassian.net
    supabase.co supabase.in appwrite.io nhost.run hasura.app ipfs.io dweb.link onion.ly tor2web.org
    """
_SECOND_LEVEL: Final = frozenset(_SECOND_LEVEL_TEXT.split())
_SUFFIXES: Final = frozenset((*_MORE_TEXT.split(), *_SERVICES_TEXT.split()))


def is_public_suffix(name: str) -> bool:
    """Whether strangers can get names below `name` (lower case, A-labels, no trailing dot)."""
    labels = name.split(".")
    if len(labels) == 1 or name in _SUFFIXES:
        return True
    if len(labels) == 2 and len(labels[1]) == 2 and labels[0] in _SECOND_LEVEL:
        return True
    # Regions stand in the middle of some: s3.eu-west-1.amazonaws.com, eastus.azurecontainer.io.
    return name.endswith((".amazonaws.com", ".azurecontainer.io", ".cloudapp.azure.com", ".core.windows.net"))
